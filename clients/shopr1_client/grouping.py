"""Grouping of single rollouts, as trainers have them, and the groups' rewards in the rollouts' order."""

import json
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from shopr1_client.wire import (
    Completion,
    GroundTruth,
    Group,
    Message,
    Prompt,
    Reward,
    ScoreResponse,
    TokenIds,
)
from shopr1_client.wire_prompt import PromptOptions


class RolloutLike(Protocol):
    """A completion, its prompt, and the human's action."""

    @property
    def prompt(self) -> str | list[Message] | TokenIds: ...
    @property
    def completion(self) -> Any: ...  # noqa: ANN401  # as `wire.Completion` accepts
    @property
    def ground_truth(self) -> str | dict[str, Any]: ...
    @property
    def options(self) -> PromptOptions: ...


class Rollout(BaseModel):
    """A completion, its prompt, and the human's action; validated on creation."""

    model_config = ConfigDict(frozen=True)

    prompt: Prompt
    completion: Completion
    ground_truth: GroundTruth
    options: PromptOptions = PromptOptions()


class Grouping:
    """Rollouts grouped by prompt, with its options, and ground truth: each prompt is sent and computed once.

    Attributes:
        groups: in the order of their first rollouts.
        indices: the rollouts of each group.

    >>> pairs = "ax", "by", "az"
    >>> grouping = Grouping([Rollout(prompt=p, completion=c, ground_truth="{}") for p, c in pairs])
    >>> [group.completions for group in grouping.groups], grouping.indices
    ([['x', 'z'], ['y']], [[0, 2], [1]])
    """

    def __init__(self, rollouts: Sequence[RolloutLike]) -> None:
        members: dict[Hashable, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            key = _prompt_key(rollout.prompt), _options_key(rollout), _truth_key(rollout.ground_truth)
            members.setdefault(key, []).append(i)
        self.indices = list(members.values())
        self.groups = [_group([rollouts[i] for i in indices]) for indices in self.indices]

    def in_order(self, answer: ScoreResponse) -> list[Reward]:
        """All rewards in the order of the rollouts."""
        rewards = {
            i: reward
            for indices, group in zip(self.indices, answer.groups, strict=True)
            for i, reward in zip(indices, group.rewards, strict=True)
        }
        return [rewards[i] for i in range(len(rewards))]


def _group(rollouts: Sequence[RolloutLike]) -> Group:
    first = rollouts[0]
    completions = [rollout.completion for rollout in rollouts]
    options = _given(first)
    return Group(prompt=first.prompt, ground_truth=first.ground_truth, completions=completions, **options)


def _prompt_key(prompt: str | list[Message] | TokenIds) -> Hashable:
    match prompt:
        case str():
            return prompt
        case TokenIds():
            return TokenIds, tuple(prompt.token_ids)
        case _:
            return Message, tuple((message.role, message.content) for message in prompt)


def _options_key(rollout: RolloutLike) -> str:
    return json.dumps(_given(rollout), sort_keys=True)


def _given(rollout: RolloutLike) -> dict[str, Any]:
    """The options that have a value; those of a prompt of token ids have no effect."""
    return {} if isinstance(rollout.prompt, TokenIds) else rollout.options.given()


def _truth_key(truth: str | dict[str, Any]) -> str:
    return truth if isinstance(truth, str) else json.dumps(truth, sort_keys=True)
