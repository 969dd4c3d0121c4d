"""Groups of single rollouts, and their rewards in the rollouts' order."""

import datetime
from typing import Any

import pytest

from shopr1_client.errors import InvalidRequestError
from shopr1_client.grouping import Grouping, Rollout
from shopr1_client.wire import Message, Reward, TokenIds
from shopr1_client.wire_prompt import PromptOptions

TRUTH = {"type": "terminate"}
CLICK = {"type": "click", "name": "b"}
REORDERED = {"name": "b", "type": "click"}
CHAT = [Message(role="user", content="a")]


def rollout(prompt: Any, completion: str = "x", truth: Any = TRUTH, **options: Any) -> Rollout:
    given = PromptOptions(**options)
    return Rollout(prompt=prompt, completion=completion, ground_truth=truth, options=given)


@pytest.mark.parametrize(
    ("first", "second", "num_groups"),
    [
        (rollout("a"), rollout("a", "y"), 1),
        (rollout("a"), rollout("b"), 2),
        (rollout("a"), rollout(CHAT), 2),
        (rollout(CHAT), rollout(CHAT, "y"), 1),
        (rollout(CHAT), rollout([Message(role="system", content="a")]), 2),
        (rollout(TokenIds(token_ids=[1])), rollout(TokenIds(token_ids=[1]), "y"), 1),
        (rollout(TokenIds(token_ids=[1])), rollout(TokenIds(token_ids=[1, 2])), 2),
        (
            rollout("a", truth=CLICK),
            rollout("a", truth=REORDERED),
            1,
        ),
        (rollout("a", truth=CLICK), rollout("a"), 2),
        (rollout("a", add_special_tokens=True), rollout("a", add_special_tokens=True), 1),
        (rollout("a", add_special_tokens=True), rollout("a"), 2),
        (
            rollout(CHAT, chat_template_kwargs={"x": 1, "y": 2}),
            rollout(CHAT, chat_template_kwargs={"y": 2, "x": 1}),
            1,
        ),
        (rollout(CHAT, chat_template_kwargs={"x": 1}), rollout(CHAT, chat_template_kwargs={"x": True}), 2),
        (rollout(TokenIds(token_ids=[1]), add_special_tokens=True), rollout(TokenIds(token_ids=[1])), 1),
    ],
)
def test_groups_share_prompt_and_ground_truth(first: Rollout, second: Rollout, num_groups: int) -> None:
    grouping = Grouping([first, second])
    assert len(grouping.groups) == num_groups
    assert grouping.indices == ([[0, 1]] if num_groups == 1 else [[0], [1]])


def test_groups_have_the_options_of_their_rollouts() -> None:
    [group] = Grouping([rollout(CHAT, chat_template_kwargs={"x": None}, continue_final_message=False)]).groups
    assert group.given() == {"chat_template_kwargs": {"x": None}, "continue_final_message": False}
    [ids] = Grouping([rollout(TokenIds(token_ids=[1]), add_special_tokens=True)]).groups
    assert ids.given() == {}


def test_rewards_are_in_the_order_of_the_rollouts() -> None:
    grouping = Grouping([rollout(prompt, completion) for prompt, completion in ("ax", "by", "az")])
    a1, a2, b1 = (Reward.model_construct(message=name) for name in ("a1", "a2", "b1"))
    assert grouping.in_order([[a1, a2], [b1]]) == [a1, b1, a2]


@pytest.mark.parametrize("truth", [None, float("nan"), datetime.date(2026, 5, 1), [TRUTH], b"{}", 1])
def test_a_malformed_ground_truth_is_named_by_its_rollout(truth: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Grouping([rollout("a"), rollout("b", truth=truth), rollout("c"), rollout("a", truth=truth)])
    assert [error["location"] for error in caught.value.errors] == [
        "rollouts[1].ground_truth",
        "rollouts[3].ground_truth",
    ]
    assert str(caught.value).startswith("rollouts[1].ground_truth: must be an object or a JSON string, not ")


def test_errors_name_rollouts() -> None:
    grouping = Grouping([rollout(prompt) for prompt in "abab"])
    locations = ["groups[1].ground_truth.name", "groups[0].completions[1].token_ids[3]", "recipe"]
    error = InvalidRequestError(
        "groups[1].ground_truth.name: bad",
        errors=[{"location": location, "message": "bad"} for location in locations],
    )
    expected = r"^rollouts\[1\]\.ground_truth\.name: bad$"
    with pytest.raises(InvalidRequestError, match=expected) as caught, grouping.naming_rollouts():
        raise error
    assert [each["location"] for each in caught.value.errors] == [
        "rollouts[1].ground_truth.name",
        "rollouts[2].completion.token_ids[3]",
        "recipe",
    ]
