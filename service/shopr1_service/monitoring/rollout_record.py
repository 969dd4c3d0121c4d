"""What the rollout log says of a rollout.

A line is a rollout, not a group: it is a row of a table as it stands, in any tool. The lines of a group lie
together, in order; the prompt, where it is asked for, stands in the first of them only.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
from pydantic import BaseModel

from shopr1_client.wire import Completion, GroupScore, Prompt, Text, TokenIds
from shopr1_rewards import Action, Recipe
from shopr1_service.core import Origin, ScoredGroup

_LINE_BYTES = 1500
"""About what a line takes without text."""
_TOKEN_ID_BYTES = 8
# Ids of tokens are text for whoever has the tokenizer, and are kept from the log like text.
_ON_DEMAND = {"tokens", "completion_token_ids"}


@dataclass(frozen=True)
class Texts:
    """What was asked, as it was sent, and what was answered, as text."""

    prompt: Prompt
    completions: list[str]

    @property
    def num_bytes(self) -> int:
        """About; long ones are what counts."""
        return _length(self.prompt) + sum(map(len, self.completions))


@dataclass(frozen=True)
class Entry:
    """A scored group, less what the log does not need: prompts are large, and queues are long."""

    time: datetime
    origin: Origin
    index: int
    recipe: Recipe
    truth: Action
    score: GroupScore
    texts: Texts | None

    @property
    def num_rollouts(self) -> int:
        return len(self.score.rewards)

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory and on disk."""
        return self.num_rollouts * _LINE_BYTES + (self.texts.num_bytes if self.texts else 0)

    def lines(self) -> bytes:
        """JSON lines, one for each rollout."""
        return b"".join(_encoded(row) + b"\n" for row in self._rows())

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
            row = reward.model_dump(exclude={"details": _ON_DEMAND})
            predicted = row["details"].pop("predicted_action")
            yield {**shared, "rollout": i, "predicted_action": predicted, **row, **self._text_of(i)}

    def _text_of(self, i: int) -> dict[str, Any]:
        if self.texts is None:
            return {}
        return {"prompt": self.texts.prompt if i == 0 else None, "completion": self.texts.completions[i]}


def entry(scored: ScoredGroup, index: int, *, with_text: bool) -> Entry:
    """What to log of a group.

    Args:
        index: of the group in its request.
    """
    return Entry(
        time=datetime.now(UTC),
        origin=scored.origin,
        index=index,
        recipe=scored.recipe,
        truth=scored.prepared.truth,
        score=scored.score,
        texts=_texts(scored) if with_text else None,
    )


def _texts(scored: ScoredGroup) -> Texts:
    rollouts = zip(scored.group.completions, scored.prepared.rollouts, strict=True)
    return Texts(scored.group.prompt, [_text(given, rollout.tokens.text) for given, rollout in rollouts])


def _text(given: Completion, decoded: str) -> str:
    match given:
        case str():
            return given
        case Text():
            return given.text
        case TokenIds():
            return decoded


def _length(prompt: Prompt) -> int:
    match prompt:
        case str():
            return len(prompt)
        case TokenIds():
            return len(prompt.token_ids) * _TOKEN_ID_BYTES
        case list():
            return sum(len(message.content) for message in prompt)


def _encoded(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row, default=_plain)
    except orjson.JSONEncodeError:  # half a surrogate pair, which no policy should write and some do
        return json.dumps(row, default=_plain, ensure_ascii=False).encode("utf-8", "replace")


def _plain(model: BaseModel) -> dict[str, Any]:
    """Prompts are sent as messages or as ids, and logged as they were sent."""
    return model.model_dump()
