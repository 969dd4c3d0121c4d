"""Strict JSON (RFC 8259), parsed by the standard library's scanner.

No `NaN`, no duplicate keys, no half surrogate pairs, no nesting beyond `MAX_DEPTH`. Errors are
`InvalidFormatError`, or `json.JSONDecodeError` for invalid syntax.
"""

import json
import re
import reprlib
from json.decoder import scanstring  # type: ignore[attr-defined]  # the C scanner; typeshed leaves it out
from typing import Any, NamedTuple

from shopr1_rewards.format_error import FormatError, InvalidFormatError

MAX_DEPTH = 64
"""Maximum nesting. An answer needs 2; a fixed limit makes the result independent of the interpreter's
recursion limit and of the depth of the caller's stack."""

WHITESPACE = " \t\n\r"
_SPACE = re.compile(rf"[{WHITESPACE}]*+")
# A key without escapes, and what follows a value.
_KEY = re.compile(rf'"([^"\\\x00-\x1f]*+)"[{WHITESPACE}]*+:[{WHITESPACE}]*+')
_NEXT = re.compile(rf"[{WHITESPACE}]*+([,}}])[{WHITESPACE}]*+")
# A string, closed or not, or a bracket outside of strings.
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


class Span(NamedTuple):
    """Half-open range of character positions."""

    start: int
    end: int


class Number(float):
    """A JSON number with its text: `5` and `5.0` are different values of an attribute.

    A float, because int() rejects more than 4,300 digits.
    """

    written: str

    def __new__(cls, written: str) -> "Number":
        number = super().__new__(cls, written)
        number.written = written
        return number


def scan_members(text: str, start: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]], int]:
    """Values of the object that begins at `start`, their positions by key, and the position after it."""
    values: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    position = skip_space(text, start + 1)
    if text.startswith("}", position):
        return values, spans, position + 1
    while True:
        plain = _KEY.match(text, position)
        key, position = (plain[1], plain.end()) if plain else _scan_key(text, position)
        if key in values:
            raise _duplicate(key)
        values[key], end = _scan_value(text, position)
        spans[key] = position, end
        following = _NEXT.match(text, end)
        if following is None:
            raise json.JSONDecodeError("Expecting ',' or '}'", text, skip_space(text, end))
        if following[1] == "}":
            return values, spans, following.end(1)
        position = following.end()


def _scan_key(text: str, position: int) -> tuple[str, int]:
    """A key of any form, and the position of its value."""
    if not text.startswith('"', position):
        raise json.JSONDecodeError("Expecting a key in double quotes", text, position)
    key, position = scanstring(text, position + 1, True)
    position = skip_space(text, position)
    if not text.startswith(":", position):
        raise json.JSONDecodeError("Expecting ':'", text, position)
    return key, skip_space(text, position + 1)


def _scan_value(text: str, position: int) -> tuple[Any, int]:
    if text.startswith('"', position):
        return scanstring(text, position + 1, True)  # type: ignore[no-any-return]  # see its import
    return DECODER.raw_decode(text, position)


def skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def check_depth(text: str, start: int, end: int | None = None) -> None:
    """Refuse the value that begins at `start` if it is nested too deeply; the time is linear in the text.

    Args:
        end: where it ends, if that is known.
    """
    if text.count("{", start, end) + text.count("[", start, end) <= MAX_DEPTH:  # also those inside strings
        return
    depth = 0
    for match in _BRACKET.finditer(text, start):
        bracket = match.group()
        if bracket in "[{":
            depth += 1
        elif bracket in "]}":
            depth -= 1
        if depth > MAX_DEPTH:
            message = f"nested deeper than {MAX_DEPTH} levels at character {match.start()}"
            raise InvalidFormatError(FormatError.TOO_DEEP, message, match.start())
        if depth == 0:
            return


def _duplicate(key: str) -> InvalidFormatError:
    return InvalidFormatError(FormatError.DUPLICATE_KEY, f"key {reprlib.repr(key)} occurs twice")


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _duplicate(key)
            seen.add(key)
    return members


def _refuse_constant(name: str) -> None:
    raise InvalidFormatError(FormatError.NON_FINITE_NUMBER, f"{name} is not a JSON number")


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_members,
    parse_constant=_refuse_constant,
    parse_int=Number,
    parse_float=Number,
)


def check_text(value: object) -> None:
    """Reject half surrogate pairs in any key or string within `value`."""
    if isinstance(value, str) and (match := _SURROGATE.search(value)):
        message = f"half a surrogate pair (U+{ord(match.group()):04X})"
        raise InvalidFormatError(FormatError.LONE_SURROGATE, message)
    if isinstance(value, dict):
        for key, member in value.items():
            check_text(key)
            check_text(member)
    elif isinstance(value, list):
        for item in value:
            check_text(item)


def may_have_surrogates(text: str) -> bool:
    """Whether JSON text may hold half a surrogate pair, as a character or as an escape."""
    return "\\u" in text or not (text.isascii() or _SURROGATE.search(text) is None)


def load(text: str) -> object:
    """The one JSON value in `text`."""
    start = skip_space(text, 0)
    check_depth(text, start)
    value, end = DECODER.raw_decode(text, start)
    if skip_space(text, end) != len(text):
        raise InvalidFormatError(
            FormatError.EXTRA_TEXT, f"text after the JSON value, at character {end}", end
        )
    check_text(value)
    return value
