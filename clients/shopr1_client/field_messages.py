"""Pydantic's errors in sentences for people who send JSON or write settings, and may not know Python."""

from collections.abc import Mapping, Sequence
from typing import Any

from shopr1_client.wire_base import is_union_tag

_MESSAGES = {
    "missing": "it is missing",
    "extra_forbidden": "unknown field",
    "json_invalid": "not JSON: {error}",
    "json_type": "must be JSON",
    "none_required": "must be null",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "int_parsing_size": "has too many digits",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_unicode": "must be valid Unicode text",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "value_error": "{error}",
    **dict.fromkeys(("string_type", "string_sub_type"), "must be a string"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "must be a list"),
    **dict.fromkeys(
        ("dict_type", "mapping_type", "model_type", "model_attributes_type"), "must be an object"
    ),
    "path_type": "must be a path",
}
"""By type. The names in braces are of the error's context."""
_EMPTY = ("string_too_short", "too_short")


def plain_message(error: Mapping[str, Any]) -> str:
    """The flaw of a field: a sentence without a subject, to be put behind the field's name.

    Args:
        error: one of `ValidationError.errors()`, with its context.

    >>> plain_message({"type": "greater_than_equal", "msg": "Input should be …", "ctx": {"ge": 0}})
    'must be at least 0'
    """
    context = error.get("ctx") or {}
    if error["type"] in _EMPTY and context.get("min_length") == 1:
        return "must not be empty"
    message = _MESSAGES.get(error["type"])
    # Types without an own sentence are those of our validators, or need no more than another subject.
    return message.format(**context) if message else error["msg"].replace("Input should", "must", 1)


def field_path(location: Sequence[str | int]) -> str:
    """A field's path from pydantic's location, without the tags of unions.

    >>> field_path(("groups", 1, "completions", 0, "<text>", "text"))
    'groups[1].completions[0].text'
    """
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not is_union_tag(part):
            path += f".{part}"
    return path.removeprefix(".")
