"""One engine behind Ray: a policy on one device, its scheduler, and its updates."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shopr1_client.errors import InvalidRequestError, NotReadyError, PolicyVersionError, ProblemError
from shopr1_client.wire import PolicyInfo
from shopr1_service.cluster.engine_metrics import QUEUED_TOKENS, Scrape
from shopr1_service.cluster.messages import Declined, Route, returns_problems
from shopr1_service.cluster.update_follower import UpdateFollower
from shopr1_service.core import Kind, Measurements, TokenGroup
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.loading import load_policy
from shopr1_service.policy.tokenizer import Codec
from shopr1_service.scheduling.scheduler import Scheduler
from shopr1_service.scoring.version_waiter import VersionWaiter
from shopr1_service.settings import Settings
from shopr1_service.updates.adapter_updates import AdapterFiles, AdapterUpdates
from shopr1_service.updates.weight_updates import Updates

_RETRY_AFTER_S = 2.0
_MAX_DTYPE_BYTES = 8


class EngineFailedError(Exception):
    """The engine hangs, its device is gone, or it cannot follow the others: Ray replaces it."""


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
    """

    def __init__(self, settings: Mapping[str, Any], name: str) -> None:
        self._settings = Settings(**settings)
        self._name = name
        self._failure: BaseException | None = None
        self._following: asyncio.Task[None] | None = None
        self._policy = load_policy(self._settings)
        self._metrics = Metrics(max_queue_tokens=self._settings.max_queue_tokens)
        self._scheduler = Scheduler(
            self._policy,
            self._metrics,
            max_queue_tokens=self._settings.max_queue_tokens,
            is_deterministic=self._settings.deterministic,
            on_fatal=self._fail,
        )
        self._metrics.watch(lambda: self._failure is None, lambda: self._policy.heartbeat.age_s)
        self._metrics.policy.record_loaded(self._policy.info)
        how = self._policy, self._scheduler, self._settings, self._metrics, VersionWaiter(self._policy)
        self._updates, self._adapters = Updates(*how), AdapterUpdates(*how)

    async def join(self, coordinator: Any, actor: Any) -> None:  # noqa: ANN401
        """Catch up with the other engines, and follow every change from then on.

        Args:
            coordinator: Ray's handle.
            actor: Ray's handle of this process.

        Raises:
            BehindError: the engine cannot catch up.
        """
        follower = UpdateFollower(
            coordinator, self._name, actor, self._policy, self._scheduler, self._updates, self._adapters
        )
        await follower.catch_up()
        self._following = asyncio.create_task(follower.follow(self._fail))

    async def measure(
        self, group: TokenGroup, kind: Kind, route: Route
    ) -> Measurements | ProblemError | Declined:
        """As `Scheduler.measure`, but problems are returned: Ray would wrap them, and log a traceback."""
        if (reason := self._reason_to_decline(route)) is not None:
            return Declined(self._name, NotReadyError(reason, retry_after_s=_RETRY_AFTER_S))
        try:
            [measurements] = await self._scheduler.measure([group], kind)
        except (NotReadyError, PolicyVersionError, InvalidRequestError) as error:
            return Declined(self._name, error)
        except ProblemError as error:
            return error
        return measurements

    async def describe(self) -> Description:
        """Describe the policy."""
        num_parameters = sum(tensor.numel() for tensor in self._policy.model.state_dict().values())
        max_weight_bytes = num_parameters * _MAX_DTYPE_BYTES
        max_adapter_bytes = self._settings.max_adapter_bytes
        return Description(self._policy.info, self._policy.codec, max_weight_bytes, max_adapter_bytes)

    async def scrape(self, _route: Route) -> Scrape:
        """Metrics of this engine."""
        return Scrape.of(self._name, self._metrics)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Numbers for `QueuedTokens`. Called by Ray at intervals."""
        return {QUEUED_TOKENS: self._scheduler.num_waiting_tokens}

    @returns_problems
    async def adapter_files(self, path: str) -> AdapterFiles:
        """Files of an adapter in a directory that engines can read."""
        return await self._adapters.files(path)

    async def check_health(self) -> None:
        """Raise if the engine must be replaced. Called by Ray at intervals."""
        if self._failure is not None:
            raise EngineFailedError(str(self._failure))
        if (age_s := self._policy.heartbeat.age_s) > self._settings.engine_timeout_s:
            raise EngineFailedError(f"no heartbeat for {age_s:.0f} s; stack:\n{self._scheduler.stack()}")

    def _reason_to_decline(self, route: Route) -> str | None:
        if self._failure is not None:
            return f"an engine has failed: {self._failure}"
        if self._policy.versions.num_changes < route.min_number:
            return "an engine has not applied the policy's last change yet"
        return None

    def _fail(self, error: BaseException) -> None:
        self._failure = error
