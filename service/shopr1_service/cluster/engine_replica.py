"""One engine behind Ray, on one device."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shopr1_client.errors import InvalidRequestError, NotReadyError, PolicyVersionError, ProblemError
from shopr1_client.wire import PolicyInfo
from shopr1_service.cluster.engine_metrics import QUEUED_TOKENS, Scrape
from shopr1_service.cluster.messages import Declined, Route, returns_problems
from shopr1_service.cluster.update_follower import UpdateFollower
from shopr1_service.core import BatchKey, GroupCertainties, TokenGroup
from shopr1_service.errors import RETRY_UPDATE_AFTER_S
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.loading import load_policy
from shopr1_service.policy.prompts.tokenizer import Codec
from shopr1_service.server.path_checks import check_paths
from shopr1_service.settings import Settings
from shopr1_service.updates.adapter_updates import AdapterFiles
from shopr1_service.updates.updatable_engine import UpdatableEngine

_MAX_DTYPE_BYTES = 8


class EngineFailedError(Exception):
    """The engine hangs, its device has failed, or it cannot follow the others: Ray replaces it."""


@dataclass(frozen=True)
class Description:
    """The policy, as the HTTP side needs it.

    Attributes:
        max_weight_bytes: no weights of this policy are larger.
    """

    info: PolicyInfo
    codec: Codec
    max_weight_bytes: int
    max_adapter_bytes: int


class EngineReplica:
    """An engine. Its constructor loads the policy, and runs a forward pass.

    Args:
        settings: output of `Settings.model_dump`.
        name: unique name of this engine.

    Raises:
        SettingsError: a path of the settings cannot be used on this machine.
    """

    def __init__(self, settings: Mapping[str, Any], name: str) -> None:
        self._settings = Settings(**settings)
        self._name = name
        self._failure: BaseException | None = None
        self._following: asyncio.Task[None] | None = None
        self._metrics = Metrics(
            max_queue_tokens=self._settings.max_queue_tokens,
            max_client_memory_bytes=self._settings.max_client_memory_bytes,
        )
        check_paths(self._settings)  # of this machine
        policy = load_policy(self._settings)
        self._engine = UpdatableEngine(policy, self._settings, self._metrics, self._fail)
        self._metrics.watch(lambda: self._failure is None, lambda: self._engine.heartbeat_age_s)

    async def join(self, coordinator: Any, actor: Any) -> None:  # noqa: ANN401
        """Catch up with the other engines, and follow every change from then on.

        Args:
            coordinator: Ray's handle.
            actor: Ray's handle of this process.

        Raises:
            BehindError: the engine cannot catch up.
        """
        follower = UpdateFollower(coordinator, self._name, actor, self._engine)
        await follower.catch_up()
        self._following = asyncio.create_task(follower.follow(self._fail))

    async def compute_certainties(
        self, group: TokenGroup, key: BatchKey, route: Route
    ) -> GroupCertainties | ProblemError | Declined:
        """As `EngineClient`, but problems are returned: Ray would log a traceback."""
        if (reason := self._reason_to_decline(route)) is not None:
            return Declined(self._name, NotReadyError(reason, retry_after_s=RETRY_UPDATE_AFTER_S))
        try:
            [measurements] = await self._engine.compute_certainties([group], key)
        except (NotReadyError, PolicyVersionError, InvalidRequestError) as error:
            return Declined(self._name, error)
        except ProblemError as error:
            return error
        return measurements

    async def describe(self) -> Description:
        """Describe the policy."""
        num_parameters = sum(tensor.numel() for tensor in self._engine.policy.model.state_dict().values())
        max_weight_bytes = num_parameters * _MAX_DTYPE_BYTES
        max_adapter_bytes = self._settings.max_adapter_bytes
        return Description(self._engine.info, self._engine.codec, max_weight_bytes, max_adapter_bytes)

    async def scrape(self, _route: Route) -> Scrape:
        """Metrics of this engine."""
        return Scrape.of(self._name, self._metrics)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Numbers for `QueuedTokens`. Called by Ray at intervals."""
        return {QUEUED_TOKENS: self._engine.scheduler.num_waiting_tokens}

    @returns_problems
    async def adapter_files(self, path: str) -> AdapterFiles:
        """Files of an adapter in a directory that engines can read."""
        return await self._engine.adapters.files(path)

    async def check_health(self) -> None:
        """Raise if the engine must be replaced. Called by Ray at intervals."""
        if self._failure is not None:
            raise EngineFailedError(str(self._failure))
        if (age_s := self._engine.heartbeat_age_s) > self._settings.engine_timeout_s:
            raise EngineFailedError(f"no heartbeat for {age_s:.0f} s; stack:\n{self._engine.stack()}")

    def _reason_to_decline(self, route: Route) -> str | None:
        if self._failure is not None:
            return f"an engine has failed: {self._failure}"
        if self._engine.versions.num_changes < route.min_number:
            return "an engine has not applied the policy's last change yet"
        return None

    def _fail(self, error: BaseException) -> None:
        self._failure = error
