"""Engines behind a Ray Serve handle, as a policy that measures elsewhere.

Ray chooses the replica of each group. When a replica dies, what it was measuring is sent to another one:
measuring changes nothing, so that nothing is lost and nothing is counted twice.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextvars import Context
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from shopr1_client.errors import NotReadyError, OverloadedError, ProblemError
from shopr1_client.wire import PolicyInfo
from shopr1_service.backlog import Kind, Measurements, Progress
from shopr1_service.cluster.replica import Description
from shopr1_service.codec import Codec
from shopr1_service.engine import TokenGroup
from shopr1_service.heartbeat import Heartbeat
from shopr1_service.versions import VersionTable

logger = logging.getLogger(__name__)

_NUM_TRIES = 5
"""Of a group: so many replicas may die under it."""
_RETRY_AFTER_S = 5.0


class _NoHeartbeat(Heartbeat):
    """There is no engine in this process; Ray watches those elsewhere."""

    @property
    def age_s(self) -> float:
        return 0.0


class Fleet:
    """See the module: a `PolicyView` and a `Measurer`."""

    def __init__(self, engines: Any, description: Description) -> None:  # noqa: ANN401  # Ray's handle
        self.heartbeat: Heartbeat = _NoHeartbeat()
        self._engines = engines
        self._description = description

    @property
    def info(self) -> PolicyInfo:
        return self._description.info

    @property
    def versions(self) -> VersionTable:
        return self._description.versions

    @property
    def codec(self) -> Codec:
        return self._description.codec

    async def measure(
        self, groups: Sequence[TokenGroup], kind: Kind, progress: Progress | None = None
    ) -> list[Measurements]:
        """As `Measurer` says. Each group has a replica of its own choice; if one is refused, all are."""
        # In contexts of their own: else Ray gives all of them the id of their HTTP request, and its router
        # loses those that it cannot tell apart.
        calls = [asyncio.create_task(self._measure(group, kind), context=Context()) for group in groups]
        try:
            return list(await asyncio.gather(*calls))
        finally:
            for call in calls:
                call.cancel()

    def refuse_if_full(self) -> None:
        """Each engine refuses for itself."""

    def stack(self) -> str:
        return "the engines run elsewhere"

    def close(self) -> None:
        """Ray ends them."""

    async def _measure(self, group: TokenGroup, kind: Kind) -> Measurements:
        if not group.completions:
            return Measurements([], self.versions.find(kind.target))
        for _ in range(_NUM_TRIES):
            try:
                outcome = await self._call(group, kind)
            except RayActorError as error:
                logger.warning("a replica is gone, its work goes to another one: %s", error)
            except BackPressureError as error:
                raise OverloadedError(str(error), retry_after_s=_RETRY_AFTER_S) from error
            except DeploymentUnavailableError as error:
                raise NotReadyError("the engines do not start", retry_after_s=_RETRY_AFTER_S) from error
            else:
                if isinstance(outcome, ProblemError):
                    raise outcome
                return outcome
        raise NotReadyError(f"{_NUM_TRIES} replicas died of it", retry_after_s=_RETRY_AFTER_S)

    async def _call(self, group: TokenGroup, kind: Kind) -> Measurements | ProblemError:
        response = self._engines.measure.remote(group, kind)
        try:
            outcome: Measurements | ProblemError = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        return outcome
