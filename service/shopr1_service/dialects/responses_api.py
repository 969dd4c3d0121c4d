"""What NeMo Gym carries of OpenAI's Responses API: a chat that the policy was given, and its one answer.

Only what can be measured exactly is taken. Tools and reasoning change what the policy saw before its answer,
but do not say how: they are refused.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Tag
from pydantic_core import PydanticCustomError

from shopr1_client.wire import Message
from shopr1_client.wire_base import UnicodeText
from shopr1_service.dialects.requests import LIST, STRING, TrainerRequest, kind


class _Part(TrainerRequest):
    type: Literal["input_text", "output_text", "text"]
    text: UnicodeText


_Content = Annotated[
    Annotated[UnicodeText, Tag(STRING)] | Annotated[list[_Part], Tag(LIST)],
    Discriminator(
        kind, custom_error_type="content_kind", custom_error_message="must be a string or a list of texts"
    ),
]


class InputMessage(TrainerRequest):
    """One message of the prompt."""

    type: Literal["message"] = "message"
    role: UnicodeText
    content: _Content

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role=self.role, content=text)


def _refuse_tools(tools: list[Any] | None) -> list[Any] | None:
    if tools:
        raise PydanticCustomError("tools", "not supported: the prompt would not be the one the policy saw")
    return tools


class CreateParams(TrainerRequest):
    """What the policy was asked, as parameters of the Responses API."""

    input: Annotated[
        Annotated[UnicodeText, Tag(STRING)] | Annotated[list[InputMessage], Tag(LIST)],
        Discriminator(
            kind,
            custom_error_type="input_kind",
            custom_error_message="must be a string or a list of messages",
        ),
    ]
    instructions: UnicodeText | None = None
    tools: Annotated[list[Any] | None, AfterValidator(_refuse_tools)] = None

    def messages(self) -> list[Message]:
        """The chat as the policy's template gets it."""
        first = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*first, Message(role="user", content=self.input)]
        return first + [item.message() for item in self.input]


class OutputText(TrainerRequest):
    """A piece of what the policy wrote."""

    type: Literal["output_text"]
    text: str


class OutputMessage(TrainerRequest):
    """What the policy wrote."""

    type: Literal["message"]
    content: list[OutputText]


def _check_single(output: list[OutputMessage]) -> list[OutputMessage]:
    if len(output) > 1:
        raise PydanticCustomError(
            "turns", "more than one message: one turn is scored, right behind the prompt"
        )
    return output


class PolicyResponse(TrainerRequest):
    """The policy's response, as the Responses API has it. No message stands for an empty completion."""

    output: Annotated[list[OutputMessage], AfterValidator(_check_single)]

    @property
    def text(self) -> str:
        return "".join(part.text for message in self.output for part in message.content)
