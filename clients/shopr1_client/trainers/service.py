"""Common part of the shims: from a trainer's rollouts to rewards."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shopr1_client.async_client import AsyncClient
from shopr1_client.client import Client
from shopr1_client.errors import FieldError, UnscorableError
from shopr1_client.grouping import Grouping, Rollout
from shopr1_client.wire import Message, Reward, ScoreRequest, TokenIds
from shopr1_client.wire_policy import VersionDemand

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_DEMAND_WAIT_S = 60.0

_PUSHED_VERSION = "shopr1_version"
"""An attribute of the trainer's state, which both callbacks and reward functions receive."""


@dataclass(frozen=True)
class Service:
    """A service with the options of its requests.

    Attributes:
        urls: a server, or several that serve the same policy (`SHOPR1_CLIENT_URL`).
        api_key: sent as a bearer token (`SHOPR1_CLIENT_API_KEY`).
        recipe: None: the service's default (`SHOPR1_CLIENT_RECIPE`).
        unscorable: reward of unscorable rollouts for trainers that require a number; None: an error
            (`SHOPR1_CLIENT_UNSCORABLE`).
        run: the training run in the service's metrics (`SHOPR1_CLIENT_RUN`).
        demand: `exact`: the version that the trainer sent last scores, if the shim knows it; `at_least`: that
            one or a later one; None: any (`SHOPR1_CLIENT_DEMAND`).
        demand_wait_s: how long the service waits for that version (`SHOPR1_CLIENT_DEMAND_WAIT_S`).
        chat_template_kwargs: arguments of the chat template, in addition to those that the shim knows from
            the trainer (`SHOPR1_CLIENT_CHAT_TEMPLATE_KWARGS`, a JSON object).
    """

    urls: tuple[str, ...]
    api_key: str | None = None
    recipe: str | None = None
    unscorable: float | None = None
    run: str | None = None
    demand: str | None = None
    demand_wait_s: float = DEFAULT_DEMAND_WAIT_S
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def find(
        cls,
        url: str | None = None,
        api_key: str | None = None,
        recipe: str | None = None,
        unscorable: float | None = None,
        run: str | None = None,
    ) -> "Service":
        """The service of the arguments, with defaults from the environment."""
        number = os.environ.get("SHOPR1_CLIENT_UNSCORABLE")
        return cls(
            urls=tuple((url or os.environ.get("SHOPR1_CLIENT_URL") or DEFAULT_URL).split(",")),
            api_key=api_key or os.environ.get("SHOPR1_CLIENT_API_KEY"),
            recipe=recipe or os.environ.get("SHOPR1_CLIENT_RECIPE"),
            unscorable=float(number) if unscorable is None and number else unscorable,
            run=run or os.environ.get("SHOPR1_CLIENT_RUN"),
            demand=_demand(os.environ.get("SHOPR1_CLIENT_DEMAND") or None),
            demand_wait_s=float(os.environ.get("SHOPR1_CLIENT_DEMAND_WAIT_S") or DEFAULT_DEMAND_WAIT_S),
            chat_template_kwargs=_object(os.environ.get("SHOPR1_CLIENT_CHAT_TEMPLATE_KWARGS") or None),
        )

    def client(self) -> Client:
        """A client of this service."""
        return Client(self.urls, api_key=self.api_key, run=self.run)

    async def score(self, rollouts: Sequence[Rollout], version: str | None = None) -> list[Reward]:
        """Rewards in the order of the rollouts. Keeps nothing between calls, for any event loop.

        Args:
            version: the version that sampled them, if known.
        """
        grouping = Grouping(rollouts)
        client = AsyncClient(self.urls, api_key=self.api_key, run=self.run)
        return grouping.in_order(await client.score(self._request(grouping, version)))

    def score_sync(self, rollouts: Sequence[Rollout], version: str | None = None) -> list[Reward]:
        """`score` without an event loop."""
        grouping = Grouping(rollouts)
        with self.client() as client:
            return grouping.in_order(client.score(self._request(grouping, version)))

    def numbers(self, rewards: Sequence[Reward]) -> list[float]:
        """Rewards for trainers that require a number for every rollout.

        Raises:
            UnscorableError: a reward is missing, and no number is configured for it.
        """
        missing: list[FieldError] = [
            {"location": f"rollouts[{i}]", "message": f"{reward.reason}: {reward.message}"}
            for i, reward in enumerate(rewards)
            if reward.reward is None
        ]
        if self.unscorable is None and missing:
            detail = f"{len(missing)} of {len(rewards)} rollouts, such as {missing[0]['message']}"
            raise UnscorableError(detail, errors=missing)
        number = self.unscorable or 0.0
        return [number if reward.reward is None else reward.reward for reward in rewards]

    def _request(self, grouping: Grouping, version: str | None) -> ScoreRequest:
        return ScoreRequest(
            recipe=self.recipe,
            groups=grouping.groups,
            policy_version=self._wanted(version),
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def _wanted(self, version: str | None) -> VersionDemand | None:
        if self.demand is None or version is None:
            return None
        return VersionDemand.model_validate({self.demand: version, "wait_s": self.demand_wait_s})


def _demand(given: str | None) -> str | None:
    if given not in (None, "exact", "at_least"):
        raise ValueError(f"SHOPR1_CLIENT_DEMAND is {given!r}, and must be exact or at_least")
    return given


def _object(given: str | None) -> dict[str, Any] | None:
    try:
        found = None if given is None else json.loads(given)
    except ValueError:
        found = ()
    if found is None or isinstance(found, dict):
        return found
    raise ValueError(f"SHOPR1_CLIENT_CHAT_TEMPLATE_KWARGS is {given!r}, and must be a JSON object")


def note_version(state: Any, version: str) -> None:  # noqa: ANN401  # a trainer's state
    """Record the newest version sent to the service."""
    setattr(state, _PUSHED_VERSION, version)


def noted_version(state: Any) -> str | None:  # noqa: ANN401
    """The newest version sent to the service; None: none is recorded, as before the training."""
    return getattr(state, _PUSHED_VERSION, None)


def arguments(value: Any) -> dict[str, Any]:  # noqa: ANN401  # of a data set or a trainer
    """Arguments of a chat template: an object, or one as JSON in a string; no value is none.

    A column of objects has the keys of all rows, with None in rows without the key.
    """
    found = json.loads(value) if isinstance(value, str) and value else value
    return {name: argument for name, argument in (found or {}).items() if argument is not None}


def listed_ids(ids: Any) -> TokenIds | None:  # noqa: ANN401  # a list, an array or a tensor; None: none are known
    """Token ids that a trainer hands over."""
    return None if ids is None else TokenIds(token_ids=[int(token_id) for token_id in ids])


def chat(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Messages in the service's form: without trainers' empty fields and lists of text parts."""
    return [
        Message.model_validate({key: _text(value) for key, value in message.items() if value is not None})
        for message in messages
    ]


def _text(content: Any) -> Any:  # noqa: ANN401  # the model rejects anything but text
    is_parts = isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    )
    return "".join(part["text"] for part in content) if is_parts else content
