"""Common part of the shims: from a trainer's rollouts to rewards."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shopr1_client.async_client import AsyncClient
from shopr1_client.client import Client
from shopr1_client.errors import FieldError, UnscorableError
from shopr1_client.grouping import Grouping, Rollout
from shopr1_client.json_text import read_json
from shopr1_client.trainers.settings import ClientSettings
from shopr1_client.wire import Message, Reward, ScoreRequest, ScoreResponse, TokenIds
from shopr1_client.wire_policy import VersionDemand
from shopr1_client.wire_prompt import WarningCode

_PUSHED_VERSION = "shopr1_version"
"""An attribute of the trainer's state, which both callbacks and reward functions receive."""


_logger = logging.getLogger(__name__)
_logged: set[WarningCode] = set()


class Service(ClientSettings):
    """A service with the options of its requests."""

    @classmethod
    def find(
        cls,
        url: str | None = None,
        api_key: str | None = None,
        recipe: str | None = None,
        unscorable: float | None = None,
        run: str | None = None,
    ) -> "Service":
        """The service of the arguments, with defaults from the environment.

        Raises:
            SettingsError: names each invalid argument or variable, and its value.
        """
        return cls.read(
            {"urls": url, "api_key": api_key, "recipe": recipe, "unscorable": unscorable, "run": run}
        )

    def client(self) -> Client:
        """A client of this service."""
        return Client(self.urls, **self._options())

    async def score(self, rollouts: Sequence[Rollout], version: str | None = None) -> list[Reward]:
        """Rewards in the order of the rollouts. Keeps nothing between calls, for any event loop.

        Args:
            version: the version that sampled them, if known.

        Raises:
            InvalidRequestError: names rollouts and fields, such as `rollouts[3].ground_truth.name`.
        """
        grouping = Grouping(rollouts)
        client = AsyncClient(self.urls, **self._options())
        with grouping.naming_rollouts():
            answer = await client.score(self._request(grouping, version))
        _log_warnings(answer)
        return grouping.in_order(group.rewards for group in answer.groups)

    def score_sync(self, rollouts: Sequence[Rollout], version: str | None = None) -> list[Reward]:
        """`score` without an event loop."""
        grouping = Grouping(rollouts)
        with self.client() as client, grouping.naming_rollouts():
            answer = client.score(self._request(grouping, version))
        _log_warnings(answer)
        return grouping.in_order(group.rewards for group in answer.groups)

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

    def _options(self) -> dict[str, Any]:
        return {"api_key": self.api_key, "run": self.run, "proxy": self.proxy}

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


def _log_warnings(answer: ScoreResponse) -> None:
    """Log the first warning of each code in this process: trainers show none, and most rollouts have it."""
    for warning in (warning for group in answer.groups for warning in group.warnings):
        if warning.code not in _logged:
            _logged.add(warning.code)
            _logger.warning("the service doubts a prompt or an end of turn: %s", warning.message)


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
    found = read_json(value) if isinstance(value, str) and value else value
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
