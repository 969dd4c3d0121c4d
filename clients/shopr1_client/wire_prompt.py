"""How a prompt becomes token ids: options of requests, and warnings of answers."""

import json
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StrictBool
from pydantic_core import PydanticCustomError

from shopr1_client.wire_base import AnswerModel, RequestModel, UnicodeText, is_unicode

RESERVED = frozenset(
    {
        *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""Parameters of transformers' `apply_chat_template` that are not arguments of the template."""


def _check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    for name in sorted(RESERVED & arguments.keys()):
        raise PydanticCustomError("reserved", "{name} is not an argument of a template", {"name": name})
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # from Python; or nested as deeply as JSON can be read
        raise PydanticCustomError("json", "must be JSON, without NaN and deep nesting") from None
    if not is_unicode(text):
        raise PydanticCustomError("unicode", "half a surrogate pair: not valid Unicode text")
    return arguments


def _check_date(date: str) -> str:
    try:
        datetime.fromisoformat(date)
    except ValueError:
        raise PydanticCustomError("date", "must be an ISO 8601 date, or date and time") from None
    return date


TemplateArguments = Annotated[dict[str, Any], AfterValidator(_check_arguments)]
IsoDate = Annotated[str, AfterValidator(_check_date)]


class PromptOptions(RequestModel):
    """How prompts become token ids. Prompts of token ids are used unchanged, whatever the options."""

    chat_template: Annotated[
        UnicodeText | None,
        Field(
            description=(
                "Name of a chat template of the service's settings or of the tokenizer, or its exact text. "
                "Default: the setting `chat_template`, else the tokenizer's own."
            )
        ),
    ] = None
    chat_template_kwargs: Annotated[
        TemplateArguments | None,
        Field(
            description=(
                "Arguments of the chat template, such as `enable_thinking`, `tools` or `documents`. They are "
                "merged by name: a group's replace the request's, which replace those of the settings."
            )
        ),
    ] = None
    chat_template_date: Annotated[
        IsoDate | None,
        Field(
            description=(
                "Date, or date and time, that `strftime_now` in a chat template takes for now, in ISO 8601. "
                "Default: the service's clock, with a warning."
            )
        ),
    ] = None
    continue_final_message: Annotated[
        StrictBool | None,
        Field(
            description=(
                "For messages that end with the assistant's. True: the completion continues that message. "
                "False: it is closed, and the completion is another one. Default: they are refused."
            )
        ),
    ] = None
    add_special_tokens: Annotated[
        StrictBool | None,
        Field(
            description=(
                "Whether the tokenizer adds its special tokens, such as BOS, to a prompt that is a string. A "
                "second BOS is never added. Default: false, with a warning where the BOS is missing."
            )
        ),
    ] = None

    def over(self, defaults: "PromptOptions") -> "PromptOptions":
        """These options, and `defaults` for those that are not given; template arguments by name."""
        given = {**defaults.given(), **self.given()}
        if self.chat_template_kwargs and defaults.chat_template_kwargs:
            given["chat_template_kwargs"] = {**defaults.chat_template_kwargs, **self.chat_template_kwargs}
        return PromptOptions.model_construct(**given)

    def given(self) -> dict[str, Any]:
        """The options that have a value, by name."""
        values = {name: getattr(self, name) for name in PromptOptions.model_fields}
        return {name: value for name, value in values.items() if value is not None}


class WarningCode(StrEnum):
    """Reason to doubt that a group was scored as its policy saw it."""

    CONTENT_NOT_IN_PROMPT = "content_not_in_prompt"
    """The chat template drops or rewrites the text of a message."""
    CLOCK_IN_PROMPT = "clock_in_prompt"
    """The chat template writes the service's date into the prompt."""
    NO_BOS = "no_bos"
    """A prompt without the BOS that its tokenizer adds, and the request does not say whether to add it."""
    UNKNOWN_END_TOKEN = "unknown_end_token"
    """Completions are invalid only because of a special token at their end."""


class ScoreWarning(AnswerModel):
    """A group was scored, but perhaps not as its policy saw it."""

    code: WarningCode
    message: str
