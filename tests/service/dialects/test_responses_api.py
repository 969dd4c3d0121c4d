"""The part of the Responses API that is read: chats, parts of text, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from shopr1_client.wire import Message
from shopr1_service.dialects.responses_api import CreateParams, InputMessage, PolicyResponse


def text_parts(kind: str, *texts: str) -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for text in texts]


@pytest.mark.parametrize(
    "content",
    ["ab", text_parts("input_text", "a", "b"), text_parts("text", "ab"), text_parts("text", "ab", "")],
)
def test_the_parts_of_a_message_are_one_text(content: Any) -> None:
    message = InputMessage.model_validate({"role": "user", "content": content, "status": "completed"})
    assert message.message() == Message(role="user", content="ab")


def test_instructions_are_the_system_message() -> None:
    user = Message(role="user", content="hi")
    for sent in ("hi", [{"role": "user", "content": "hi"}]):
        assert CreateParams.model_validate({"input": sent}).messages() == [user]
        assert CreateParams.model_validate({"input": sent, "instructions": ""}).messages() == [user]
        params = CreateParams.model_validate({"input": sent, "instructions": "be brief", "tools": []})
        assert params.messages() == [Message(role="system", content="be brief"), user]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "Field required"),
        ({"input": {"role": "user"}}, "must be a string or a list of messages"),
        ({"input": [{"role": "user", "content": None}]}, "must be a string or a list of texts"),
        ({"input": [{"type": "reasoning", "role": "user", "content": ""}]}, "'message'"),
        ({"input": [{"role": "user", "content": text_parts("input_image", "")}]}, "'input_text'"),
        ({"input": "\ud83d"}, "half a surrogate pair"),
        ({"input": "", "tools": [{"type": "function"}]}, "not supported"),
    ],
)
def test_refused_chats(params: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CreateParams.model_validate(params)
    [error] = caught.value.errors()
    assert message in error["msg"]


def test_the_text_of_a_response() -> None:
    output = {"type": "message", "content": text_parts("output_text", "a", "\ud83d")}
    assert PolicyResponse.model_validate({"output": [output]}).text == "a\ud83d"
    assert PolicyResponse.model_validate({"output": []}).text == ""
    with pytest.raises(ValidationError, match="more than one message"):
        PolicyResponse.model_validate({"output": [output, output]})
