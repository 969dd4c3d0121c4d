"""Strict JSON: valid text reads as by the standard library, everything else is refused by name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_rewards.format_error import FormatError, InvalidFormatError
from shopr1_rewards.strict_json import MAX_DEPTH, check_depth, check_text, load, scan_members, skip_space

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=12,
)


def refused(text: str) -> InvalidFormatError:
    with pytest.raises(InvalidFormatError) as caught:
        load(text)
    return caught.value


@given(VALUES, st.text(" \t\n\r", max_size=3), st.booleans(), st.sampled_from([None, 2]))
def test_a_value_survives_writing_and_reading(
    value: Any, space: str, is_ascii: bool, indent: int | None
) -> None:
    assert load(space + json.dumps(value, ensure_ascii=is_ascii, indent=indent) + space) == value


@given(st.dictionaries(TEXT, VALUES, max_size=4), TEXT, TEXT)
def test_the_span_of_a_member_is_its_text(members: dict[str, Any], before: str, after: str) -> None:
    text = before + json.dumps(members) + after
    values, spans, end = scan_members(text, len(before))
    assert end == len(text) - len(after)
    assert values == members
    assert {key: json.loads(text[slice(*span)]) for key, span in spans.items()} == members


@pytest.mark.parametrize("text", ["{1: 2}", '{"a" 1}', '{"a": 1 "b": 2}', '{"a": 1,}', "{,}", '{"a"', "{"])
def test_members_with_broken_syntax(text: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        scan_members(text, 0)


@pytest.mark.parametrize(
    ("text", "error", "position"),
    [
        ("[NaN]", FormatError.NON_FINITE_NUMBER, 0),
        ('[{"a": 1, "\\u0061": 2}]', FormatError.DUPLICATE_KEY, 0),
        ('["\\ud83d"]', FormatError.LONE_SURROGATE, 0),
        ('{"\\ude00": [1]}', FormatError.LONE_SURROGATE, 0),
        (" {} x", FormatError.EXTRA_TEXT, 3),
        ("[" * 65 + "]" * 65, FormatError.TOO_DEEP, 64),
    ],
)
def test_refused_text(text: str, error: FormatError, position: int) -> None:
    caught = refused(text)
    assert (caught.failure.error, caught.position) == (error, position)


def test_numbers_are_floats() -> None:
    assert isinstance(load("7"), float)
    assert load("1" + "0" * 5000) == float("inf")  # int() rejects so many digits


@given(st.integers(0, MAX_DEPTH + 3))
def test_depth_counts_open_brackets(depth: int) -> None:
    text = "x" + '[{"a":' * (depth // 2) + "[" * (depth % 2) + r'"[[{\"{"'
    if depth <= MAX_DEPTH:
        check_depth(text, 1)
    else:
        with pytest.raises(InvalidFormatError, match=f"deeper than {MAX_DEPTH} levels"):
            check_depth(text, 1)


def test_depth_is_that_of_the_first_value() -> None:
    check_depth("[] " + "[" * (MAX_DEPTH + 1), 0)


@given(st.text(st.characters(exclude_categories=())))
def test_half_surrogate_pairs_are_found_at_any_place(text: str) -> None:
    is_valid = not any("\ud800" <= char <= "\udfff" for char in text)
    for value in (text, {"a": [text]}, [{text: 1}]):
        if is_valid:
            check_text(value)
        else:
            with pytest.raises(InvalidFormatError, match="half a surrogate pair"):
                check_text(value)


def test_only_the_white_space_of_json_is_skipped() -> None:
    assert skip_space("a \t\r\nb", 1) == 5
    assert skip_space("\u00a0", 0) == skip_space("\f", 0) == 0
