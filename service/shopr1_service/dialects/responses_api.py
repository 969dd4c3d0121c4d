"""The part of OpenAI's Responses API that NeMo Gym sends: a chat, and the policy's one response to it.

Only what can be scored exactly is accepted. Tools and reasoning change the tokens before the response in ways
that the request does not show: they are refused.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Tag
from pydantic_core import PydanticCustomError

from shopr1_client.wire import Message
from shopr1_client.wire_base import MESSAGES, STRING, UnicodeText, by_type
from shopr1_service.dialects.requests import TrainerRequest


class _Part(TrainerRequest):
    type: Literal["input_text", "output_text", "text"]
    text: UnicodeText


_Content = Annotated[
    Annotated[UnicodeText, Tag(STRING)] | Annotated[list[_Part], Tag(MESSAGES)],
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


def _refuse_tools(tools: list[Any] | None) -> list[Any] | None:
    if tools:
        raise PydanticCustomError("tools", "not supported: the prompt would not be the one the policy saw")
    return tools


class CreateParams(TrainerRequest):
    """The chat, as parameters of the Responses API."""

    input: Annotated[
        Annotated[UnicodeText, Tag(STRING)] | Annotated[list[InputMessage], Tag(MESSAGES)],
        by_type({STRING: str, MESSAGES: list}, "input_kind", "must be a string or a list of messages"),
    ]
    instructions: UnicodeText | None = None
    tools: Annotated[list[Any] | None, AfterValidator(_refuse_tools)] = None

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


class OutputMessage(TrainerRequest):
    """The policy's message."""

    type: Literal["message"]
    content: list[OutputText]


def _check_single(output: list[OutputMessage]) -> list[OutputMessage]:
    if len(output) > 1:
        raise PydanticCustomError(
            "turns", "more than one message: one turn is scored, directly after the prompt"
        )
    return output


class PolicyResponse(TrainerRequest):
    """The policy's response, in the form of the Responses API. No message is an empty completion."""

    output: Annotated[list[OutputMessage], AfterValidator(_check_single)]

    @property
    def text(self) -> str:
        return "".join(part.text for message in self.output for part in message.content)
