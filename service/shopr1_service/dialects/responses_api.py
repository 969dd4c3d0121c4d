"""The part of OpenAI's Responses API that NeMo Gym sends: a chat, and the policy's one response to it.

Only what can be scored exactly is accepted. Tools and reasoning change the tokens before the response in ways
that the text does not show: they are refused, unless the response has token ids.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, StrictBool, Tag
from pydantic_core import PydanticCustomError

from shopr1_client.json_text import DuplicateKeyError, read_json
from shopr1_client.wire import Message, TokenId, TokenIds
from shopr1_client.wire_base import IN_PIECES, MESSAGES, OBJECT, STRING, TEXT, UnicodeText, by_type
from shopr1_client.wire_prompt import PromptOptions, TemplateArguments
from shopr1_service.dialects.requests import TrainerRequest


class _Part(TrainerRequest):
    type: Literal["input_text", "output_text", "text"]
    text: UnicodeText


_Digits = Annotated[str, Field(pattern="^[0-9]{1,10}$")]


def _from_digits(value: Any) -> Any:  # noqa: ANN401  # the id refuses whatever is no integer
    """Some of NeMo Gym's servers write ids as strings."""
    is_digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10
    return int(value) if is_digits else value


_TokenId = Annotated[TokenId, BeforeValidator(_from_digits, json_schema_input_type=TokenId | _Digits)]
_Content = Annotated[
    Annotated[UnicodeText, Tag(STRING)] | Annotated[list[_Part], IN_PIECES, Tag(MESSAGES)],
    by_type({STRING: str, MESSAGES: list}, "content_kind", "must be a string or a list of texts"),
]


class InputMessage(TrainerRequest):
    """One message of the prompt."""

    type: Literal["message"] = "message"
    role: UnicodeText
    content: _Content

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role=self.role, content=text)


class _ExtraBody(TrainerRequest):
    """The parameters of vLLM's chat completions that change the prompt."""

    chat_template_kwargs: TemplateArguments | None = None
    continue_final_message: StrictBool | None = None


def _from_json(value: Any) -> Any:  # noqa: ANN401  # the models refuse whatever is no object
    """Values of `metadata` are strings in the Responses API: NeMo Gym writes objects as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value or "null")
    except DuplicateKeyError as error:
        raise PydanticCustomError("duplicate_key", "{message}", {"message": str(error)}) from None
    except (ValueError, RecursionError):
        raise PydanticCustomError("json", "must be a JSON object in a string") from None


class Metadata(TrainerRequest):
    """The keys that NeMo Gym's model server passes on to the policy."""

    chat_template_kwargs: Annotated[TemplateArguments | None, BeforeValidator(_from_json)] = None
    extra_body: Annotated[_ExtraBody | None, BeforeValidator(_from_json)] = None

    def options(self) -> PromptOptions:
        """How the policy's server made a prompt of the messages."""
        extra = self.extra_body or _ExtraBody()
        given = extra.chat_template_kwargs if self.chat_template_kwargs is None else self.chat_template_kwargs
        return PromptOptions(chat_template_kwargs=given, continue_final_message=extra.continue_final_message)


class CreateParams(TrainerRequest):
    """The chat, as parameters of the Responses API."""

    input: Annotated[
        Annotated[UnicodeText, Tag(STRING)] | Annotated[list[InputMessage], IN_PIECES, Tag(MESSAGES)],
        by_type({STRING: str, MESSAGES: list}, "input_kind", "must be a string or a list of messages"),
    ]
    instructions: UnicodeText | None = None
    tools: list[Any] | None = None
    metadata: Metadata | None = None

    def options(self) -> PromptOptions:
        """Options for the prompt."""
        return (self.metadata or Metadata()).options()

    def messages(self) -> list[Message]:
        """The chat, as the policy's chat template takes it."""
        first = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*first, Message(role="user", content=self.input)]
        return first + [item.message() for item in self.input]


class OutputText(TrainerRequest):
    """A part of the policy's text."""

    type: Literal["output_text"]
    text: str


class _WithIds(TrainerRequest):
    """The token ids of a call of the policy, on the last item of its output; both or none of them count."""

    prompt_token_ids: Annotated[list[_TokenId], Field(fail_fast=True)] | None = None
    generation_token_ids: Annotated[list[_TokenId], Field(fail_fast=True)] | None = None

    @property
    def ids(self) -> tuple[TokenIds, TokenIds] | None:
        """Those of the prompt, and those that were sampled."""
        if self.prompt_token_ids is None or self.generation_token_ids is None:
            return None
        return TokenIds(token_ids=self.prompt_token_ids), TokenIds(token_ids=self.generation_token_ids)


class Reasoning(_WithIds):
    """The policy's reasoning, which its server has taken out of the text."""

    type: Literal["reasoning"]


class OutputMessage(_WithIds):
    """The policy's message."""

    type: Literal["message"]
    content: Annotated[list[OutputText], IN_PIECES]


def _kind_of_item(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return TEXT if kind == "reasoning" else OBJECT


OutputItem = Annotated[
    Annotated[OutputMessage, Tag(OBJECT)] | Annotated[Reasoning, Tag(TEXT)], Discriminator(_kind_of_item)
]


def _check_single(output: list[OutputItem]) -> list[OutputItem]:
    if sum(isinstance(item, OutputMessage) for item in output) > 1 or _num_calls(output) > 1:
        raise PydanticCustomError(
            "turns", "more than one message: one turn is scored, directly after the prompt"
        )
    return output


def _num_calls(output: Sequence[_WithIds]) -> int:
    return sum(item.ids is not None for item in output)


class PolicyResponse(TrainerRequest):
    """The policy's response, in the form of the Responses API. No message is an empty completion."""

    output: Annotated[list[OutputItem], IN_PIECES, AfterValidator(_check_single)]

    @property
    def text(self) -> str:
        messages = (item for item in self.output if isinstance(item, OutputMessage))
        return "".join(part.text for message in messages for part in message.content)

    @property
    def ids(self) -> tuple[int, tuple[TokenIds, TokenIds]] | None:
        """The item that has token ids, and these."""
        return next(((i, item.ids) for i, item in enumerate(self.output) if item.ids is not None), None)

    @property
    def reasoning(self) -> int | None:
        """The item that is reasoning."""
        return next((i for i, item in enumerate(self.output) if isinstance(item, Reasoning)), None)
