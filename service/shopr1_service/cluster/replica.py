"""An engine as a Ray Serve deployment: a policy on one device, and its scheduler."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shopr1_client.errors import ProblemError
from shopr1_client.wire import PolicyInfo
from shopr1_service.backlog import Kind, Measurements
from shopr1_service.codec import Codec
from shopr1_service.engine import TokenGroup
from shopr1_service.loading import load_policy
from shopr1_service.metrics import Metrics
from shopr1_service.scheduler import Scheduler
from shopr1_service.settings import Settings
from shopr1_service.versions import VersionTable


class EngineFailedError(Exception):
    """The engine hangs, or its device is gone: Ray has to start another one."""


@dataclass(frozen=True)
class Description:
    """What whoever sends work must know of the policy."""

    info: PolicyInfo
    codec: Codec
    versions: VersionTable


class EngineReplica:
    """See the module. Ready as soon as it has been made, because a real forward is part of loading.

    Args:
        settings: as `Settings.model_dump` gives them.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = Settings(**settings)
        self._failure: BaseException | None = None
        self._policy = load_policy(self._settings)
        metrics = Metrics(max_queue_tokens=self._settings.max_queue_tokens)
        self._scheduler = Scheduler(
            self._policy,
            metrics,
            max_queue_tokens=self._settings.max_queue_tokens,
            is_deterministic=self._settings.deterministic,
            on_fatal=self._fail,
        )

    async def measure(self, group: TokenGroup, kind: Kind) -> Measurements | ProblemError:
        """As `Scheduler.measure`. A refusal is returned: raised, Ray would wrap and log it as a bug."""
        try:
            [measurements] = await self._scheduler.measure([group], kind)
        except ProblemError as error:
            return error
        return measurements

    async def describe(self) -> Description:
        return Description(self._policy.info, self._policy.codec, self._policy.versions)

    async def check_health(self) -> None:
        """Ray calls it again and again, and replaces a replica that raises."""
        if self._failure is not None:
            raise EngineFailedError(str(self._failure))
        if (age_s := self._policy.heartbeat.age_s) > self._settings.engine_timeout_s:
            raise EngineFailedError(f"no sign for {age_s:.0f} s; it is here:\n{self._scheduler.stack()}")

    def _fail(self, error: BaseException) -> None:
        self._failure = error
