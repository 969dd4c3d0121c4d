"""Options for prompts: their checks, and which of several count."""

from typing import Any

import pytest
from pydantic import ValidationError

from shopr1_client.wire import Group, ScoreRequest
from shopr1_client.wire_prompt import PromptOptions

GROUP = {"prompt": "page", "ground_truth": {"type": "terminate"}, "completions": []}


def test_a_groups_options_replace_those_of_its_request_which_replace_the_defaults() -> None:
    defaults = PromptOptions(
        chat_template="a",
        chat_template_kwargs={"x": 1, "y": 1, "z": {"deep": 1}},
        chat_template_date="2026-01-01",
    )
    request = ScoreRequest.model_validate(
        {"groups": [{**GROUP, "chat_template_kwargs": {"z": {}, "w": None}}], "add_special_tokens": False}
        | {"chat_template_kwargs": {"y": 2, "z": 2}, "continue_final_message": True}
    )
    options = request.groups[0].over(request).over(defaults)
    assert options.given() == {
        "chat_template": "a",
        "chat_template_kwargs": {"x": 1, "y": 2, "z": {}, "w": None},
        "chat_template_date": "2026-01-01",
        "continue_final_message": True,
        "add_special_tokens": False,
    }


def test_options_without_values_change_nothing() -> None:
    assert Group.model_validate(GROUP).given() == {}
    options = PromptOptions(chat_template_kwargs={"x": 1}, add_special_tokens=False)
    assert PromptOptions().over(options) == options == options.over(PromptOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"chat_template_kwargs": {"x": 1, "add_generation_prompt": False}},
            "add_generation_prompt is not an arg",
        ),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template is not an argument"),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize is not an argument"),
        ({"chat_template_kwargs": {"sanitize_control_tokens": True}}, "sanitize_control_tokens is not"),
        ({"chat_template_kwargs": {"x": ["\ud83d"]}}, "half a surrogate pair"),
        ({"chat_template_kwargs": {"\ud83d": 1}}, "half a surrogate pair"),
        ({"chat_template_kwargs": {"x": float("nan")}}, "must be JSON"),
        ({"chat_template_kwargs": {"tools": [print]}}, "must be JSON"),
        ({"chat_template_kwargs": "{}"}, "valid dictionary"),
        ({"chat_template_date": "tomorrow"}, "must be an ISO 8601 date"),
        ({"continue_final_message": "yes"}, "valid boolean"),
        ({"add_special_tokens": 1}, "valid boolean"),
    ],
)
@pytest.mark.parametrize("place", [PromptOptions, Group, ScoreRequest])
def test_bad_options_are_refused(place: Any, options: dict[str, Any], message: str) -> None:
    required: dict[Any, dict[str, Any]] = {Group: GROUP, ScoreRequest: {"groups": []}}
    with pytest.raises(ValidationError) as caught:
        place.model_validate({**required.get(place, {}), **options})
    [error] = caught.value.errors()
    assert message in error["msg"]
    assert error["loc"][0] in options
