"""The names of everything a policy can get wrong about the output format."""

from dataclasses import dataclass
from enum import StrEnum


class FormatError(StrEnum):
    """Why a completion earns no format reward."""

    EMPTY = "empty"
    """Nothing but white space and end tokens."""
    INVALID_JSON = "invalid_json"
    """Not JSON: broken syntax, a raw control character in a string, or cut off."""
    NOT_AN_OBJECT = "not_an_object"
    """JSON, but a list, a string, a number …"""
    EXTRA_TEXT = "extra_text"
    """Something stands before or after the object."""
    NO_OBJECT = "no_object"
    """Tolerant reading only: no object anywhere in the text."""
    DUPLICATE_KEY = "duplicate_key"
    NON_FINITE_NUMBER = "non_finite_number"
    """`NaN`, `Infinity` or `-Infinity`, which JSON does not have."""
    TOO_DEEP = "too_deep"
    """Nested deeper than `MAX_DEPTH`."""
    LONE_SURROGATE = "lone_surrogate"
    """Half of a surrogate pair, raw or as an escape: no Unicode text."""
    MISSING_RATIONALE = "missing_rationale"
    MISSING_ACTION = "missing_action"
    MISSING_ACTION_TYPE = "missing_action_type"
    WRONG_TYPE = "wrong_type"
    """`rationale`, `action`, its `type` or an attribute is not of the JSON type it must be."""
    UNKNOWN_ACTION_TYPE = "unknown_action_type"
    """Only where the recipe rejects them."""
    MISSING_ATTRIBUTE = "missing_attribute"
    """Only where the recipe rejects them."""
    EXTRA_KEY = "extra_key"
    """Only where the recipe rejects them."""


@dataclass(frozen=True)
class FormatFailure:
    """A completion that has not: the error's name, and what and where in words."""

    error: FormatError
    message: str


class InvalidFormatError(Exception):
    """Carries a `FormatFailure` through the scanner; no public function lets it out.

    `position` is where reading came to a stop, or 0 where a hook of the scanner cannot know.
    """

    def __init__(self, error: FormatError, message: str, position: int = 0) -> None:
        super().__init__(message)
        self.failure = FormatFailure(error, message)
        self.position = position
