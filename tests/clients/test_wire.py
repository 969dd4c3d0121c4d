"""The models of the wire: what they accept, that they are frozen, and that they survive JSON."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from shopr1_client import wire
from shopr1_client.wire import Group, Include, Message, ScoreRequest, Text, TokenIds

TRUTH = {"type": "terminate"}
HALF_PAIR = "\ud83d"


def group(**changes: Any) -> dict[str, Any]:
    return {"prompt": "p", "ground_truth": TRUTH, "completions": [], **changes}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", ""),
        ("page", "page"),
        ([], []),
        ([{"role": "user", "content": "hi"}], [Message(role="user", content="hi")]),
        ({"token_ids": []}, TokenIds(token_ids=[])),
        ({"token_ids": [0, 2**40]}, TokenIds(token_ids=[0, 2**40])),
        (TokenIds(token_ids=[1]), TokenIds(token_ids=[1])),
    ],
)
def test_prompts(prompt: Any, expected: Any) -> None:
    assert Group.model_validate(group(prompt=prompt)).prompt == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("", ""),
        ('{"text": "x"}', '{"text": "x"}'),
        ({"text": "x"}, Text(text="x")),
        ({"token_ids": [5]}, TokenIds(token_ids=[5])),
        (Text(text="x"), Text(text="x")),
        (TokenIds(token_ids=[5]), TokenIds(token_ids=[5])),
    ],
)
def test_completions(completion: Any, expected: Any) -> None:
    assert Group.model_validate(group(completions=[completion])).completions == [expected]


def test_a_completion_may_hold_half_a_surrogate_pair() -> None:
    """It is what a policy wrote, and worth 0: no reason to refuse the request."""
    sent = [HALF_PAIR, {"text": HALF_PAIR}]
    assert Group.model_validate(group(completions=sent)).completions == [HALF_PAIR, Text(text=HALF_PAIR)]


@pytest.mark.parametrize("truth", [{}, {"type": 3, "x": None}, "", "{"])
def test_a_ground_truth_is_only_checked_against_a_recipe(truth: Any) -> None:
    assert Group.model_validate(group(ground_truth=truth)).ground_truth == truth


@pytest.mark.parametrize(
    ("changes", "location"),
    [
        ({"prompt": None}, ("prompt",)),
        ({"prompt": 1}, ("prompt",)),
        ({"prompt": b"p"}, ("prompt",)),
        ({"prompt": HALF_PAIR}, ("prompt", "<string>")),
        ({"prompt": [{"role": HALF_PAIR, "content": ""}]}, ("prompt", "<messages>", 0, "role")),
        ({"id": HALF_PAIR}, ("id",)),
        ({"prompt": {"token_ids": [True]}}, ("prompt", "<token_ids>", "token_ids", 0)),
        ({"prompt": {"token_ids": [1.0]}}, ("prompt", "<token_ids>", "token_ids", 0)),
        ({"prompt": {"token_ids": ["1"]}}, ("prompt", "<token_ids>", "token_ids", 0)),
        ({"prompt": {"token_ids": [-1]}}, ("prompt", "<token_ids>", "token_ids", 0)),
        ({"prompt": [{"role": "user", "content": 1}]}, ("prompt", "<messages>", 0, "content")),
        ({"completions": [None]}, ("completions", 0)),
        ({"completions": [{"text": None}]}, ("completions", 0, "<text>", "text")),
        ({"completions": [{"text": "", "token_ids": []}]}, ("completions", 0, "<text>", "token_ids")),
        ({"ground_truth": None}, ("ground_truth",)),
        ({"ground_truth": [TRUTH]}, ("ground_truth",)),
        ({"id": 1}, ("id",)),
        ({"weight": 1}, ("weight",)),
    ],
)
def test_invalid_requests_are_rejected(changes: dict[str, Any], location: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        Group.model_validate(group(**changes))
    assert [flaw["loc"] for flaw in caught.value.errors()] == [location]


def test_a_request_needs_groups_and_no_more() -> None:
    request = ScoreRequest.model_validate({"groups": []})
    assert (request.recipe, request.policy_version, request.include) == (None, None, [])
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate({})


def test_a_misspelt_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="polcy_version"):
        ScoreRequest.model_validate({"groups": [], "polcy_version": "1"})


def test_include() -> None:
    request = ScoreRequest.model_validate({"groups": [], "include": ["token_ids", "tokens"]})
    assert request.include == [Include.TOKEN_IDS, Include.TOKENS]


def test_a_request_survives_json() -> None:
    options = {
        "chat_template": "plain",
        "chat_template_kwargs": {"enable_thinking": False},
        "chat_template_date": "2026-05-01",
        "continue_final_message": True,
        "add_special_tokens": False,
    }
    body = {
        "recipe": "shop_r1",
        "groups": [
            group(
                id="é",
                prompt=[{"role": "user", "content": "漢"}],
                completions=["a", {"text": "b"}],
                **options,
            ),
            group(
                id=None,
                prompt={"token_ids": [1]},
                ground_truth="{}",
                completions=[{"token_ids": [2]}],
                **dict.fromkeys(options),
            ),
        ],
        **options,
        "policy_version": "7",
        "adapter": None,
        "include": ["tokens"],
    }
    request = ScoreRequest.model_validate(body)
    assert json.loads(request.model_dump_json()) == body
    assert ScoreRequest.model_validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize("model", [wire.ScoreRequest, wire.Group, wire.Message, wire.Text, wire.TokenIds])
def test_requests_are_frozen_and_closed(model: type[BaseModel]) -> None:
    assert model.model_config["frozen"]
    assert model.model_config["extra"] == "forbid"


@pytest.mark.parametrize("model", [wire.ScoreResponse, wire.Reward, wire.Details, wire.Info, wire.Problem])
def test_answers_are_frozen_and_open(model: type[BaseModel]) -> None:
    """An older client must read a newer server's answer."""
    assert model.model_config["frozen"]
    assert model.model_config.get("extra", "ignore") == "ignore"
