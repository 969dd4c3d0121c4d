"""JSON in which no object has a key twice.

RFC 8259 leaves open which of two equal keys counts, and readers differ. Python's own takes the last without a
word: with two ground truths in a rollout, the wrong one could be scored.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Union

_MAX_LOCATIONS = 20
_WINDOW_CHARS = 2**16
_KEY_END = re.compile(r'"[ \t\n\r]*+:')

_Path = tuple[Union["_Path", None], str | int]
"""A key or an index, and the path of what has it."""


class DuplicateKeyError(ValueError):
    """An object has a key twice.

    Attributes:
        locations: paths of such keys, at most 20, such as `groups[1].ground_truth.name`.
    """

    message = "the key occurs twice"

    def __init__(self, locations: Sequence[str]) -> None:
        super().__init__("; ".join(f"{location}: {self.message}" for location in locations))
        self.locations = list(locations)


class _Ambiguous(dict[str, Any]):
    """An object that has a key twice, with all its members."""

    def __init__(self, members: list[tuple[str, Any]]) -> None:
        super().__init__(members)
        self.members = members


class TooManyKeysError(ValueError):
    """An object has more keys than the reader takes."""


def read_json(text: str | bytes, max_keys: int | None = None) -> Any:  # noqa: ANN401  # whatever JSON can hold
    """The value of a JSON text, read by the standard library.

    >>> read_json('{"name": [1, 2.5]}')
    {'name': [1, 2.5]}
    >>> read_json('{"groups": [{"id": "a", "id": "b"}]}')
    Traceback (most recent call last):
    shopr1_client.json_text.DuplicateKeyError: groups[0].id: the key occurs twice

    Raises:
        JSONDecodeError, UnicodeDecodeError: not JSON.
        RecursionError: nested too deeply.
        DuplicateKeyError: an object has a key twice.
        TooManyKeysError: an object has more than `max_keys`.
    """
    if max_keys is not None:
        text = text if isinstance(text, str) else text.decode(json.detect_encoding(text), "surrogatepass")
        _check_num_keys(text, max_keys)
    num_ambiguous = 0

    def unite(members: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal num_ambiguous
        if max_keys is not None and len(members) > max_keys:
            raise TooManyKeysError(f"an object has {len(members)} keys, at most {max_keys} are read")
        # One comparison per object is the least that a check can cost. Between such functions of Python's
        # other threads can run.
        united = dict(members)
        if len(united) == len(members):
            return united
        num_ambiguous += 1
        return _Ambiguous(members)

    value = json.loads(text, object_pairs_hook=unite)
    if num_ambiguous:
        raise DuplicateKeyError([_written(path) for path in islice(_duplicates(value), _MAX_LOCATIONS)])
    return value


def _check_num_keys(text: str, max_keys: int) -> None:
    """Refuse a text in which `max_keys` keys follow each other without a brace that opens an object.

    The library reads such a row of keys in one step, in which no other thread runs, before an object can be
    counted. Each window of this function is a step, too. Keys inside strings count, too.
    """
    if text.count(":") <= max_keys:
        return
    num_keys = 0
    for begin in range(0, len(text), _WINDOW_CHARS):
        start, end = begin, begin + _WINDOW_CHARS
        if (brace := text.rfind("{", start, end)) >= 0:
            num_keys, start = 0, brace
        num_keys += sum(1 for _ in _KEY_END.finditer(text, start, end))
        if num_keys > max_keys:
            raise TooManyKeysError(
                f"more than {max_keys} keys follow each other, at most {max_keys} are read"
            )


def _duplicates(value: object) -> Iterator[_Path]:
    """Paths of duplicate keys, in the order of the text. Without recursion: JSON may be nested deeply."""
    stack: list[tuple[_Path | None, object]] = [(None, value)]
    while stack:
        path, value = stack.pop()
        members = _members(value)
        if isinstance(value, _Ambiguous):
            counts = Counter(key for key, _ in members)
            yield from ((path, key) for key, num in counts.items() if num > 1)
        stack += [((path, key), member) for key, member in reversed(members)]


def _members(value: object) -> Sequence[tuple[str | int, Any]]:
    match value:
        case _Ambiguous():
            return value.members
        case dict():
            return list(value.items())
        case list():
            return list(enumerate(value))
        case _:
            return ()


def _written(path: _Path | None) -> str:
    parts: list[str] = []
    while path is not None:
        path, part = path
        parts.append(f"[{part}]" if isinstance(part, int) else f".{part}")
    return "".join(reversed(parts)).removeprefix(".")
