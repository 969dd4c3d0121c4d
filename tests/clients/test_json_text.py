"""JSON without duplicate keys, against the standard library's reader."""

import json
from typing import Any

import pytest

from shopr1_client.json_text import DuplicateKeyError, TooManyKeysError, read_json


@pytest.mark.parametrize(
    "text",
    [
        "1",
        '"a"',
        "null",
        "[]",
        "{}",
        '{"a": {"a": [{"a": 1}, {"a": 2}]}, "b": {"a": 1}}',
        '{"a": "\\"a\\": 1, \\"a\\": 2"}',
        '{"": 1, " ": 2}',
        '{"é": 1, "e\\u0301": 2}',  # equal only after normalisation
        '"\\ud83d"',
        "[1e999, NaN]",
    ],
)
def test_everything_else_is_as_json_reads_it(text: str) -> None:
    assert repr(read_json(text)) == repr(json.loads(text))
    assert repr(read_json(text.encode())) == repr(json.loads(text))


@pytest.mark.parametrize(
    ("text", "locations"),
    [
        ('{"a": 1, "a": 1}', ["a"]),
        ('{"a": 1, "b": 2, "a": 3, "b": 4, "a": 5}', ["a", "b"]),
        ('[{"a": 1}, {"a": 1, "a": 2}]', ["[1].a"]),
        ('{"groups": [{"id": "p", "ground_truth": {"x": 1, "x": 2}}]}', ["groups[0].ground_truth.x"]),
        ('{"a": {"b": 1, "b": 2}, "a": {"c": 3, "c": 4}}', ["a", "a.b", "a.c"]),
        ('{"a": {"b": 1, "b": 2}, "c": [[{"d": 1, "d": 2}]]}', ["a.b", "c[0][0].d"]),
        ('{"a": 1, "\\u0061": 2}', ["a"]),
        ('{"": 1, "": 2}', [""]),
        ('{ "a"\n:\t1 , "a"\r:2}', ["a"]),
    ],
)
def test_duplicate_keys_are_named(text: str, locations: list[str]) -> None:
    for given in (text, text.encode(), text.encode("utf-16")):
        with pytest.raises(DuplicateKeyError) as caught:
            read_json(given)
        assert caught.value.locations == locations
        assert str(caught.value) == "; ".join(f"{each}: the key occurs twice" for each in locations)


def test_the_error_is_bounded() -> None:
    with pytest.raises(DuplicateKeyError) as caught:
        read_json("[" + ", ".join(['{"a": 1, "a": 2}'] * 1000) + "]")
    assert caught.value.locations == [f"[{i}].a" for i in range(20)]


def test_a_duplicate_far_down() -> None:
    with pytest.raises(DuplicateKeyError) as caught:
        read_json('[{"k": ' * 200 + '{"a": 1, "a": 2}' + "}]" * 200)
    assert caught.value.locations == ["[0].k" * 200 + ".a"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"a": 1, "a": 2', json.JSONDecodeError),
        (b'{"a": "\xff"}', UnicodeDecodeError),
        ("[" * 100_000, RecursionError),
    ],
)
def test_text_that_is_no_json(text: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        read_json(text)


MAX_KEYS = 65_536


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separators", [(",", ":"), (" , ", "\n:\t ")])
def test_an_object_with_too_many_keys_is_refused_unread(
    encoding: str, separators: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    value: list[object] = [{"a": 1}, dict.fromkeys(map(str, range(2 * MAX_KEYS)), 0), {"b": 2}]
    text = json.dumps(value, separators=separators)
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(TooManyKeysError, match="more than 65536 keys follow each other"):
        read_json(text.encode(encoding), MAX_KEYS)


@pytest.mark.parametrize(
    "value",
    [
        dict.fromkeys(map(str, range(MAX_KEYS)), 0),
        [{"prompt": "a:b", "truth": {"type": "click", "name": '"x": '}}] * MAX_KEYS,
        {str(i): {"": i} for i in range(MAX_KEYS)},
        ["a: b, c: d, http://e"] * MAX_KEYS,
        {"prompt": ":" * 3 * MAX_KEYS, "ids": list(range(MAX_KEYS))},
    ],
    ids=["one object of as many", "labels", "nested objects", "texts", "colons"],
)
def test_other_objects_are_read(value: object) -> None:
    assert read_json(json.dumps(value).encode(), MAX_KEYS) == value


def test_keys_between_other_objects_are_counted_when_they_are_read() -> None:
    value: dict[str, object] = {str(i): {} if i % 5000 == 0 else 0 for i in range(MAX_KEYS + 1)}
    with pytest.raises(TooManyKeysError, match="an object has 65537 keys"):
        read_json(json.dumps(value), MAX_KEYS)
