"""Records of the rollout log.

A line is a rollout and not a group, so that any tool reads it as a row of a table. The lines of a group are
consecutive and in order. The prompt, if it is logged, is in the first of them only.
"""

import json
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import orjson
from pydantic import BaseModel

from shopr1_client.wire import Completion, Prompt, Text, TokenIds
from shopr1_rewards import Action, Recipe
from shopr1_service.answers import Details, GroupScore, Reward
from shopr1_service.core import Origin, ScoredGroup

_LINE_BYTES = 1500
"""Approximate size of a line without text."""
_TOKEN_ID_BYTES = 8
# The tokenizer turns token ids into text, so they are excluded like text.
_ON_DEMAND = {"tokens", "completion_token_ids"}


@dataclass(frozen=True)
class Entry:
    """A scored group without the data that the log does not need: prompts are large, and queues are long.

    Attributes:
        time: when it was scored.
        index: number of the group in its request.
        prompt, completions: as sent, and as text; None if text is not logged.
    """

    time: datetime
    origin: Origin
    index: int
    recipe: Recipe
    truth: Action
    score: GroupScore
    prompt: Prompt | None = None
    completions: list[str] | None = None

    @property
    def num_rollouts(self) -> int:
        return len(self.score.rewards)

    @property
    def num_bytes(self) -> int:
        """Approximate size in memory and on disk."""
        num_text_bytes = _length(self.prompt) + sum(map(len, self.completions or ()))
        return self.num_rollouts * _LINE_BYTES + num_text_bytes

    def lines(self) -> bytes:
        """JSON lines, one for each rollout."""
        return b"".join(_encode(row) + b"\n" for row in self._rows())

    def _rows(self) -> Iterator[dict[str, Any]]:
        shared = {
            "time": f"{self.time:%Y-%m-%dT%H:%M:%S.%fZ}",
            "request_id": self.origin.request_id,
            "run": self.origin.run,
            "recipe": self.recipe.name,
            "recipe_digest": self.recipe.digest,
            "policy_version": self.score.policy_version,
            "policy_number": self.score.policy_number,
            "adapter": self.score.adapter,
            "group": self.index,
            "group_id": self.score.id,
            "num_rollouts": self.num_rollouts,
            "ground_truth": self.truth.to_dict(),
        }
        for i, reward in enumerate(self.score.rewards):
            details = _fields(reward.details, _ON_DEMAND | {"predicted_action"})
            row = _fields(reward) | {"details": details}
            predicted = reward.details.predicted_action
            yield {**shared, "rollout": i, "predicted_action": predicted, **row, **self._text_of(i)}

    def _text_of(self, i: int) -> dict[str, Any]:
        if self.completions is None:
            return {}
        return {"prompt": self.prompt if i == 0 else None, "completion": self.completions[i]}


def make_entry(scored: ScoredGroup, *, with_text: bool) -> Entry:
    """The entry of a group.

    Args:
        with_text: include prompt and completions.
    """
    return Entry(
        time=datetime.now(UTC),
        origin=scored.origin,
        index=scored.index,
        recipe=scored.recipe,
        truth=scored.facts.truth,
        score=scored.score,
        prompt=scored.group.prompt if with_text else None,
        completions=_texts(scored) if with_text else None,
    )


def _texts(scored: ScoredGroup) -> list[str]:
    rollouts = zip(scored.group.completions, scored.facts.rollouts, strict=True)
    return [_text(sent, facts.decoded or "") for sent, facts in rollouts]


def _text(sent: Completion, decoded: str) -> str:
    match sent:
        case str():
            return sent
        case Text():
            return sent.text
        case TokenIds():
            return decoded


def _length(prompt: Prompt | None) -> int:
    match prompt:
        case None:
            return 0
        case str():
            return len(prompt)
        case TokenIds():
            return len(prompt.token_ids) * _TOKEN_ID_BYTES
        case list():
            return sum(len(message.content) for message in prompt)


def _fields(answer: Reward | Details, excluded: AbstractSet[str] = frozenset()) -> dict[str, Any]:
    names = (field.name for field in fields(answer))
    return {name: getattr(answer, name) for name in names if name not in excluded}


def _encode(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row, default=_to_json)
    except orjson.JSONEncodeError:  # half a surrogate pair, which some policies write
        return json.dumps(row, default=_to_json, ensure_ascii=False).encode("utf-8", "replace")


def _to_json(model: BaseModel) -> dict[str, Any]:
    """Messages and token ids of a prompt, as they were sent."""
    return model.model_dump()
