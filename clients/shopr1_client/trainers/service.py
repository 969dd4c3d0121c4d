"""What all shims have in common: from a trainer's rollouts to rewards."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shopr1_client.async_client import AsyncClient
from shopr1_client.client import Client
from shopr1_client.errors import FieldError, UnscorableError
from shopr1_client.rollouts import Grouping, Rollout
from shopr1_client.wire import Message, Reward, ScoreRequest

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Service:
    """A service and how to ask it.

    Attributes:
        urls: of one server, or of several that serve the same policy (`SHOPR1_CLIENT_URL`).
        api_key: sent as a bearer token (`SHOPR1_CLIENT_API_KEY`).
        recipe: None is the service's default (`SHOPR1_CLIENT_RECIPE`).
        unscorable: what a trainer that knows nothing but numbers gets for a rollout that cannot be scored;
            None is an error (`SHOPR1_CLIENT_UNSCORABLE`).
        run: by which the service's metrics tell training runs apart (`SHOPR1_CLIENT_RUN`).
    """

    urls: tuple[str, ...]
    api_key: str | None = None
    recipe: str | None = None
    unscorable: float | None = None
    run: str | None = None

    @classmethod
    def find(
        cls,
        url: str | None = None,
        api_key: str | None = None,
        recipe: str | None = None,
        unscorable: float | None = None,
        run: str | None = None,
    ) -> "Service":
        """As given, and for the rest as the environment says."""
        given = os.environ.get("SHOPR1_CLIENT_UNSCORABLE")
        return cls(
            urls=tuple((url or os.environ.get("SHOPR1_CLIENT_URL") or DEFAULT_URL).split(",")),
            api_key=api_key or os.environ.get("SHOPR1_CLIENT_API_KEY"),
            recipe=recipe or os.environ.get("SHOPR1_CLIENT_RECIPE"),
            unscorable=float(given) if unscorable is None and given else unscorable,
            run=run or os.environ.get("SHOPR1_CLIENT_RUN"),
        )

    async def score(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        """Rewards in the order of the rollouts. Nothing is kept between calls: any event loop will do."""
        grouping = Grouping(rollouts)
        client = AsyncClient(self.urls, api_key=self.api_key, run=self.run)
        return grouping.in_order(await client.score(self._request(grouping)))

    def score_sync(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        """The same without an event loop."""
        grouping = Grouping(rollouts)
        with Client(self.urls, api_key=self.api_key, run=self.run) as client:
            return grouping.in_order(client.score(self._request(grouping)))

    def numbers(self, rewards: Sequence[Reward]) -> list[float]:
        """For trainers that know no missing reward.

        Raises:
            UnscorableError: a reward is missing, and no number may stand for it.
        """
        missing: list[FieldError] = [
            {"location": f"rollouts[{i}]", "message": f"{reward.reason}: {reward.message}"}
            for i, reward in enumerate(rewards)
            if reward.reward is None
        ]
        if self.unscorable is None and missing:
            detail = f"{len(missing)} of {len(rewards)} rollouts, such as {missing[0]['message']}"
            raise UnscorableError(detail, errors=missing)
        stand_in = self.unscorable or 0.0
        return [stand_in if reward.reward is None else reward.reward for reward in rewards]

    def _request(self, grouping: Grouping) -> ScoreRequest:
        return ScoreRequest(recipe=self.recipe, groups=grouping.groups)


def chat(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Messages as the service takes them: trainers add empty fields, and write texts as lists of parts."""
    return [
        Message.model_validate({key: _text(value) for key, value in message.items() if value is not None})
        for message in messages
    ]


def _text(content: Any) -> Any:  # noqa: ANN401  # what is no text is refused by the model
    is_parts = isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    )
    return "".join(part["text"] for part in content) if is_parts else content
