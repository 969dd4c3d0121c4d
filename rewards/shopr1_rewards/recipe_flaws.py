"""Errors of recipes in words: the key as TOML has it, the rule, the value."""

import json
import re
import reprlib

from pydantic_core import ErrorDetails, PydanticCustomError

# Tags of unions appear in pydantic's error locations; the brackets distinguish them from keys.
NUMBER, DARS = "<number>", "<dars>"

_IMPOSSIBLE = "impossible"
_BARE_KEY = re.compile("[A-Za-z0-9_-]+")
_MESSAGES = {
    **dict.fromkeys(("model_type", "dict_type"), "must be a table"),
    "tuple_type": "must be a list",
    "string_type": "must be a string",
    "too_short": "must not be empty",
}
"""Errors of pydantic that are too much about Python, by type."""


def impossible(message: str) -> PydanticCustomError:
    """An error of several keys together."""
    return PydanticCustomError(_IMPOSSIBLE, "{message}", {"message": message})


def flaw(details: ErrorDetails) -> str:
    """One of `ValidationError.errors()` in words."""
    key = "".join(map(_key, details["loc"])).removeprefix(".")
    if details["type"] == "extra_forbidden":
        return f"unknown key {key!r}"
    if details["type"] == "missing":
        return f"missing key {key!r}"
    where = f"{key}: " if key else ""
    if details["type"] == _IMPOSSIBLE:
        return where + details["msg"]
    message = _MESSAGES.get(details["type"]) or details["msg"].replace("Input should", "must", 1)
    return f"{where}{message} (got {_shortened(details['input'])})"


def _key(part: str | int) -> str:
    """A part of pydantic's location as in a dotted key of TOML."""
    if isinstance(part, int):
        return f"[{part}]"
    if part in (NUMBER, DARS, "[key]"):
        return ""
    return f".{part}" if _BARE_KEY.fullmatch(part) else f".{json.dumps(part)}"


def _shortened(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no integer with thousands of digits
        return "an integer with thousands of digits"
