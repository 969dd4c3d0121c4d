"""What all models of requests, and all models of answers, have in common."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class RequestModel(BaseModel):
    """A misspelt key must not silently become a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class AnswerModel(BaseModel):
    """What a newer service adds does not break an older client."""

    model_config = ConfigDict(frozen=True)


# Tags of unions appear in pydantic's error locations; the brackets tell them from keys of the request.
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


def _check_unicode(text: str) -> str:
    # Python's JSON decoder lets half surrogate pairs through; nothing behind it can write them out again.
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
