"""Codes of the errors that a policy can make in the output format."""

from dataclasses import dataclass
from enum import StrEnum


class FormatError(StrEnum):
    """Reason why a completion's format is invalid, so that it earns nothing."""

    EMPTY = "empty"
    """Only white space and end tokens."""
    INVALID_JSON = "invalid_json"
    """Not JSON: broken syntax, a raw control character in a string, or cut off."""
    NOT_AN_OBJECT = "not_an_object"
    """JSON, but a list, a string, a number …"""
    EXTRA_TEXT = "extra_text"
    """Text before or after the object."""
    NO_OBJECT = "no_object"
    """Tolerant reading only: no object anywhere in the text."""
    DUPLICATE_KEY = "duplicate_key"
    NON_FINITE_NUMBER = "non_finite_number"
    """`NaN`, `Infinity` or `-Infinity`, which JSON does not have."""
    TOO_DEEP = "too_deep"
    """Nested deeper than `MAX_DEPTH`."""
    LONE_SURROGATE = "lone_surrogate"
    """Half of a surrogate pair, raw or escaped, which is not valid Unicode."""
    MISSING_RATIONALE = "missing_rationale"
    MISSING_ACTION = "missing_action"
    MISSING_ACTION_TYPE = "missing_action_type"
    WRONG_TYPE = "wrong_type"
    """`rationale`, `action`, its `type` or an attribute has the wrong JSON type."""
    UNKNOWN_ACTION_TYPE = "unknown_action_type"
    """Only if the recipe rejects it."""
    MISSING_ATTRIBUTE = "missing_attribute"
    """Only if the recipe rejects it."""
    EXTRA_KEY = "extra_key"
    """Only if the recipe rejects it."""


@dataclass(frozen=True)
class FormatFailure:
    """The error of a completion: its code, and a message with the position."""

    error: FormatError
    message: str


class InvalidFormatError(Exception):
    """Carries a `FormatFailure` through the scanner; no public function raises it.

    `position` is where parsing stopped, or 0 if a hook of the scanner raised it.
    """

    def __init__(self, error: FormatError, message: str, position: int = 0) -> None:
        super().__init__(message)
        self.failure = FormatFailure(error, message)
        self.position = position
