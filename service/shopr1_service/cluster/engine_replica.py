"""An engine as it runs behind Ray: a policy on one device, its scheduler, and who changes it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shopr1_client.errors import InvalidRequestError, NotReadyError, PolicyVersionError, ProblemError
from shopr1_client.wire import PolicyInfo
from shopr1_service.cluster.autoscaling import QUEUED_TOKENS
from shopr1_service.cluster.engine_metrics import Scrape
from shopr1_service.cluster.messages import returning_problems
from shopr1_service.cluster.routing_view import Elsewhere, Route
from shopr1_service.cluster.update_follower import Follower
from shopr1_service.core import Kind, Measurements, TokenGroup
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.loading import load_policy
from shopr1_service.policy.tokenizer import Codec
from shopr1_service.scheduling.scheduler import Scheduler
from shopr1_service.scoring.version_waiter import VersionWaiter
from shopr1_service.settings import Settings
from shopr1_service.updates.adapter_updates import AdapterFiles, AdapterUpdates
from shopr1_service.updates.weight_updates import WeightUpdates

_RETRY_AFTER_S = 2.0
_MAX_NUMBER_BYTES = 8


class EngineFailedError(Exception):
    """The engine hangs, its device is gone, or its weights are not the others': Ray starts another one."""


@dataclass(frozen=True)
class Description:
    """What whoever sends work must know of the policy.

    Attributes:
        max_weight_bytes: new weights cannot have more.
    """

    info: PolicyInfo
    codec: Codec
    max_weight_bytes: int
    max_adapter_bytes: int


class EngineReplica:
    """See the module. A real forward is part of loading.

    Args:
        settings: as `Settings.model_dump` gives them.
        name: of this engine among all.
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
        self._updates, self._adapters = WeightUpdates(*how), AdapterUpdates(*how)

    async def join(self, journal: Any, actor: Any) -> None:  # noqa: ANN401
        """Be brought to where the other engines are, and make every change from then on.

        Args:
            journal: Ray's handle.
            actor: Ray's handle of this process.

        Raises:
            BehindError: it cannot be brought there.
        """
        follower = Follower(
            journal, self._name, actor, self._policy, self._scheduler, self._updates, self._adapters
        )
        await follower.catch_up()
        self._following = asyncio.create_task(follower.follow(self._fail))

    async def measure(
        self, group: TokenGroup, kind: Kind, route: Route
    ) -> Measurements | ProblemError | Elsewhere:
        """As `Scheduler.measure`. A refusal is returned: raised, Ray would wrap it, and log it as a bug."""
        if (why := self._refusal(route)) is not None:
            return Elsewhere(self._name, NotReadyError(why, retry_after_s=_RETRY_AFTER_S))
        try:
            [measurements] = await self._scheduler.measure([group], kind)
        except (NotReadyError, PolicyVersionError, InvalidRequestError) as error:
            return Elsewhere(self._name, error)
        except ProblemError as error:
            return error
        return measurements

    async def describe(self) -> Description:
        max_numbers = sum(tensor.numel() for tensor in self._policy.model.state_dict().values())
        return Description(
            self._policy.info,
            self._policy.codec,
            max_numbers * _MAX_NUMBER_BYTES,
            self._settings.max_adapter_bytes,
        )

    async def scrape(self, _route: Route) -> Scrape:
        """What it has counted."""
        return Scrape.of(self._name, self._metrics)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray calls it again and again, where the number of engines may change."""
        return {QUEUED_TOKENS: self._scheduler.num_waiting_tokens}

    @returning_problems
    async def adapter_files(self, path: str) -> AdapterFiles:
        """What stands in a directory that engines can read."""
        return await self._adapters.files(path)

    async def check_health(self) -> None:
        """Ray calls it again and again, and replaces a replica that raises."""
        if self._failure is not None:
            raise EngineFailedError(str(self._failure))
        if (age_s := self._policy.heartbeat.age_s) > self._settings.engine_timeout_s:
            raise EngineFailedError(f"no sign for {age_s:.0f} s; it is here:\n{self._scheduler.stack()}")

    def _refusal(self, route: Route) -> str | None:
        """Why this engine must not answer."""
        if self._failure is not None:
            return f"an engine has failed: {self._failure}"
        if self._policy.versions.num_changes < route.floor:
            return "an engine has not made the policy's last change yet"
        return None

    def _fail(self, error: BaseException) -> None:
        self._failure = error
