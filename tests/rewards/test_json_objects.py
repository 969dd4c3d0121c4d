"""Positions of objects, against readings from every brace."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shopr1_rewards import json_objects
from shopr1_rewards.json_objects import object_spans
from tests.support.completions import CountingPattern

KEYS = frozenset(("a", "b"))


def found(text: str) -> list[str]:
    return [text[slice(*span)] for span in object_spans(text, KEYS)]


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("", []),
        ("{}", []),
        ('{"a": 1}', []),
        ('{"a": 1, "b": 2}', ['{"a": 1, "b": 2}']),
        ('{"b": 1, "c": 2, "a" \n: 3}', ['{"b": 1, "c": 2, "a" \n: 3}']),
        (r'{"\u0061": 1, "b": 2}', [r'{"\u0061": 1, "b": 2}']),
        (r'{"\x61": 1, "b": 2}', []),
        ('{"x": {"a": 1}, "b": 2}', []),  # keys of different objects
        ('{"x": ["a", "b"]}', []),  # values
        ('[{"a": 1, "b": 2}]', ['{"a": 1, "b": 2}']),
        ('{"a": {"a": 1, "b": 2}, "b": 3}', ['{"a": {"a": 1, "b": 2}, "b": 3}', '{"a": 1, "b": 2}']),
        ('{"a": 1, "b": 2]', []),
        ('{ {"a": 1, "b": 2}', ['{"a": 1, "b": 2}']),
        ('{" {"a": 1, "b": 2}', ['{"a": 1, "b": 2}']),
        ('\\{"a": "}", "b": 2}', ['{"a": "}", "b": 2}']),
        ('{"a": "\\"}", "b": 2}', ['{"a": "\\"}", "b": 2}']),
        ('{"a": 1, "b": "open', []),
    ],
)
def test_hand_made(text: str, objects: list[str]) -> None:
    assert found(text) == objects


HOSTILE = st.text('{}[]":\\ ab', max_size=60) | st.lists(
    st.sampled_from(['{"a":', '"b":', "1,", "1}", "}", '{"', '"', "\\"]), max_size=20
).map("".join)


@given(HOSTILE)
@example('{"{"a":1,"b":1}')
def test_every_object_with_the_keys_is_found(text: str) -> None:
    decoder = json.JSONDecoder()
    expected = []
    for start in (i for i, char in enumerate(text) if char == "{"):
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            continue
        if value.keys() >= KEYS:
            expected.append((start, end))
    assert set(expected) <= set(object_spans(text, KEYS))
    assert object_spans(text, KEYS) == sorted(object_spans(text, KEYS))


@given(HOSTILE)
@example('{"{"{"{"')
def test_no_character_is_read_more_than_twice(text: str) -> None:
    pattern = CountingPattern(json_objects._LEXEME)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_objects, "_LEXEME", pattern)
        object_spans(text, KEYS)
    assert pattern.num_chars <= 2 * len(text)
