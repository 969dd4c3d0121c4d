"""The part of the Responses API that is read: chats, parts of text, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from shopr1_client.wire import Message, TokenIds
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
        ({"input": "", "metadata": {"chat_template_kwargs": "{"}}, "must be a JSON object in a string"),
        ({"input": "", "metadata": {"chat_template_kwargs": "[1]"}}, "valid dictionary"),
        (
            {"input": "", "metadata": {"chat_template_kwargs": '{"tokenize": 1}'}},
            "tokenize is not an argument",
        ),
        ({"input": "", "metadata": {"extra_body": "7"}}, "valid dictionary"),
        ({"input": "", "metadata": {"extra_body": {"continue_final_message": 0}}}, "valid boolean"),
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


# NeMo Gym's own forms: objects as JSON in a string, because values of `metadata` are strings.
METADATA = [
    (
        {"chat_template_kwargs": '{"enable_thinking": false}'},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ),
    ({"chat_template_kwargs": {"x": 1}, "other": "y"}, {"chat_template_kwargs": {"x": 1}}),
    ({"chat_template_kwargs": "", "extra_body": ""}, {}),
    (
        {"extra_body": '{"top_k": 20, "chat_template_kwargs": {"x": 1}, "continue_final_message": true}'},
        {"chat_template_kwargs": {"x": 1}, "continue_final_message": True},
    ),
    (
        {"extra_body": '{"chat_template_kwargs": {"x": 1}}', "chat_template_kwargs": '{"y": 2}'},
        {"chat_template_kwargs": {"y": 2}},
    ),
    (None, {}),
]


@pytest.mark.parametrize(("metadata", "options"), METADATA)
def test_options_of_the_prompt_are_in_the_metadata(metadata: Any, options: dict[str, Any]) -> None:
    params = CreateParams.model_validate({"input": "hi", "metadata": metadata})
    assert params.options().given() == options


@pytest.mark.parametrize("flawed", [False, 1.0, -1, "", "-1", "1.0", " 1", "１", "1" * 11, None])
def test_ids_are_integers_or_their_digits(flawed: Any) -> None:
    item = {"type": "reasoning", "prompt_token_ids": [1], "generation_token_ids": [flawed]}
    with pytest.raises(ValidationError, match="generation_token_ids"):
        PolicyResponse.model_validate({"output": [item]})


def test_token_ids_are_on_one_item_of_the_output() -> None:
    ids = {"prompt_token_ids": [1, 2], "generation_token_ids": ["3", 4], "generation_log_probs": [0.0, 0.0]}
    message = {"type": "message", "content": text_parts("output_text", "a")}
    reasoning = {"type": "reasoning", "summary": []}
    response = PolicyResponse.model_validate({"output": [reasoning, {**message, **ids}]})
    assert response.ids == (1, (TokenIds(token_ids=[1, 2]), TokenIds(token_ids=[3, 4])))
    assert (response.text, response.reasoning) == ("a", 0)
    only_prompt = PolicyResponse.model_validate({"output": [{**message, "prompt_token_ids": [1]}]})
    assert only_prompt.ids is None
    for output in ([{**message, **ids}, {**reasoning, **ids}], [reasoning, message, message]):
        with pytest.raises(ValidationError, match="more than one message"):
            PolicyResponse.model_validate({"output": output})
