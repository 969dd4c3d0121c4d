"""Base classes and types of the wire models."""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

_PIECE = 64
"""Items of a list that are validated at a time: pydantic lets no other thread run before they are."""
_MAX_KEYS = 64
"""More keys than any object has. Each unknown key is an error with its name."""


class RequestModel(BaseModel):
    """Base of requests: unknown keys are rejected, so that a misspelt one does not become a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _bound_keys(cls, value: Any) -> Any:  # noqa: ANN401  # of any type before validation
        if isinstance(value, dict) and len(value) > _MAX_KEYS:
            template = "has {num_keys} keys; none has more than {max_keys}"
            raise PydanticCustomError("keys", template, {"num_keys": len(value), "max_keys": _MAX_KEYS})
        return value


class AnswerModel(BaseModel):
    """Base of answers: unknown keys are ignored, so that a newer service can add some."""

    model_config = ConfigDict(frozen=True)


# Tags of unions appear in pydantic's error locations; the brackets distinguish them from keys.
STRING, NUMBER, MESSAGES, TEXT, TOKEN_IDS, OBJECT = _TAGS = (
    "<string>",
    "<number>",
    "<messages>",
    "<text>",
    "<token_ids>",
    "<object>",
)


def is_union_tag(part: str | int) -> bool:
    """Whether a part of a pydantic error location names a member of a union and not a key."""
    return part in _TAGS


def by_type(
    types: Mapping[str, type | tuple[type, ...]], code: str, message: str, *, text_key: bool = False
) -> Discriminator:
    """A discriminator that chooses the member of a union by the value's JSON type.

    Args:
        types: types per tag; a boolean is never a number.
        code, message: the error of a value of any other type.
        text_key: an object with the key `text` has the tag `TEXT`.
    """

    def tag(value: object) -> str | None:
        if isinstance(value, bool):
            return None
        if text_key and isinstance(value, dict) and "text" in value:
            return TEXT
        return next((tag for tag, kinds in types.items() if isinstance(value, kinds)), None)

    return Discriminator(tag, custom_error_type=code, custom_error_message=message)


def matches(pattern: str, rule: str) -> Callable[[str], str]:
    """A validator of text that matches a pattern as a whole; `rule` is the error in words."""
    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise PydanticCustomError("pattern", "{rule}", {"rule": rule})
        return text

    return check


def _in_pieces(items: Any, validate: Callable[[Any], list[Any]]) -> list[Any]:  # noqa: ANN401  # see above
    if not isinstance(items, list) or len(items) <= _PIECE:
        return validate(items)
    validated: list[Any] = []
    for start in range(0, len(items), _PIECE):
        try:
            validated += validate(items[start : start + _PIECE])
        except ValidationError:
            return validate(items[: start + _PIECE])  # raises it, with the places in the whole list
    return validated


IN_PIECES = WrapValidator(_in_pieces)
"""For lists that may be long: their items are validated some at a time, up to the first wrong ones."""


def _texts_at_once(items: Any, validate: Callable[[Any], list[Any]]) -> list[Any]:  # noqa: ANN401  # see above
    is_valid = type(items) is list and all(type(item) is str for item in items)
    return items.copy() if is_valid else validate(items)


TEXTS_AT_ONCE = WrapValidator(_texts_at_once)
"""For lists of items that may be any text: where all are, there is nothing to validate."""


def _check_unicode(text: str) -> str:
    # Python's JSON decoder accepts half surrogate pairs, which cannot be encoded again.
    if not is_unicode(text):
        raise PydanticCustomError("unicode", "half a surrogate pair: not valid Unicode text")
    return text


def is_unicode(text: str) -> bool:
    """Whether a string can be encoded: Python's may hold half surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


UnicodeText = Annotated[str, AfterValidator(_check_unicode)]
