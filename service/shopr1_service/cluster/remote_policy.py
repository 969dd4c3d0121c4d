"""Engines behind a Ray Serve handle, as a policy that measures elsewhere.

Ray chooses the replica of each group. When a replica dies, what it was measuring is sent to another one:
measuring changes nothing, so that nothing is lost and nothing is counted twice.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextvars import Context
from typing import Any

from prometheus_client import Metric
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from shopr1_client.errors import NotReadyError, OverloadedError, ProblemError
from shopr1_client.wire import PolicyInfo
from shopr1_service.cluster.engine_metrics import Scrape, labelled
from shopr1_service.cluster.engine_replica import Description
from shopr1_service.cluster.messages import ClusterView, Declined, Route
from shopr1_service.cluster.remote_updates import FleetAdapters, FleetWeights
from shopr1_service.core import Kind, Measurements, Progress, TokenGroup
from shopr1_service.engine.heartbeat import Heartbeat
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.tokenizer import Codec
from shopr1_service.policy.versions import VersionTable
from shopr1_service.scoring.version_waiter import VersionWaiter
from shopr1_service.updates.factory import Changes

logger = logging.getLogger(__name__)

_NUM_TRIES = 5
"""Of a group: so many replicas may die under it."""
_RETRY_AFTER_S = 5.0
_SCRAPE_S = 3.0
"""Prometheus waits for 10 s, for all of them."""
_PATIENCE_S = 1.0
"""Before the journal is asked again when it did not answer."""


class _NoHeartbeat(Heartbeat):
    """There is no engine in this process; Ray watches those elsewhere."""

    @property
    def age_s(self) -> float:
        return 0.0


class RemoteEngines:
    """See the module: a `PolicyView`, a `EngineClient` and a `ChangingPolicy`.

    Args:
        engines: Ray's handle of them.
        journal: and of the journal.
    """

    def __init__(self, engines: Any, journal: Any, description: Description, view: ClusterView) -> None:  # noqa: ANN401
        self.heartbeat: Heartbeat = _NoHeartbeat()
        self.view = view
        self._engines = engines
        self._journal = journal
        self._description = description
        self._watching: asyncio.Task[None] | None = None

    @property
    def info(self) -> PolicyInfo:
        current = self.versions.current
        return self._description.info.model_copy(update={"version": current.name, "number": current.number})

    @property
    def versions(self) -> VersionTable:
        return self.view.table

    @property
    def settled_number(self) -> int:
        return self.view.min_number

    @property
    def codec(self) -> Codec:
        return self._description.codec

    def open_changes(self, metrics: Metrics, new_versions: VersionWaiter) -> Changes:
        def see(view: ClusterView) -> None:
            if view.revision < self.view.revision:  # an answer that was overtaken by a later one
                return
            is_new = view.table.num_changes != self.view.table.num_changes
            self.view = view
            if is_new:
                metrics.policy.record_loaded(self.info, len(self.versions.loaded()))
            new_versions.tell()

        self._watching = asyncio.create_task(self._watch(see))
        limits = self._description
        weights = FleetWeights(self._journal, lambda: self.view, see, metrics, limits.max_weight_bytes)
        return weights, FleetAdapters(self._journal, self._engines, see, limits.max_adapter_bytes)

    async def measure(
        self, groups: Sequence[TokenGroup], kind: Kind, progress: Progress | None = None
    ) -> list[Measurements]:
        """As `EngineClient` says. Each group has a replica of its own choice; if one is refused, all are."""
        # In contexts of their own: else Ray gives all of them the id of their HTTP request, and its router
        # loses those that it cannot tell apart.
        calls = [asyncio.create_task(self._measure(group, kind), context=Context()) for group in groups]
        try:
            return list(await asyncio.gather(*calls))
        finally:
            for call in calls:
                call.cancel()

    async def scrape(self) -> list[Metric]:
        """As `ScrapedPolicy` says."""
        calls = [asyncio.create_task(self._scrape(name), context=Context()) for name in self.view.engines]
        scrapes = await asyncio.gather(*calls)
        return labelled({each.engine: each for each in scrapes if each is not None}.values())

    def refuse_if_full(self) -> None:
        """Each engine refuses for itself."""

    def stack(self) -> str:
        return "the engines run elsewhere"

    def close(self) -> None:
        """Ray ends the engines."""
        if self._watching is not None:
            self._watching.cancel()

    async def _scrape(self, engine: str) -> Scrape | None:
        try:
            async with asyncio.timeout(_SCRAPE_S):
                scrape: Scrape = await self._engines.scrape.remote(Route(frozenset({engine})))
        except (RayError, TimeoutError):  # it is gone, or busy
            return None
        return scrape

    async def _watch(self, see: Any) -> None:  # noqa: ANN401
        """Follow what the journal knows."""
        while True:
            try:
                view = await self._journal.view.remote(self.view.revision)
            except RayError as error:  # it is being replaced
                logger.warning("the journal does not answer: %s", error)
                await asyncio.sleep(_PATIENCE_S)
            else:
                if view is not None:
                    see(view)

    async def _measure(self, group: TokenGroup, kind: Kind) -> Measurements:
        if not group.completions:
            return Measurements([], self.versions.find(kind.target))
        problem: ProblemError = NotReadyError(
            f"{_NUM_TRIES} replicas died of it", retry_after_s=_RETRY_AFTER_S
        )
        refused: set[str] = set()
        for _ in range(_NUM_TRIES):
            holders = self.view.engines_with(kind.target)
            if refused and holders <= refused:
                break
            outcome = await self._try(group, kind, Route(holders - refused or None, self.view.min_number))
            if isinstance(outcome, Measurements):
                return outcome
            if isinstance(outcome, ProblemError):
                raise outcome
            if outcome is not None:
                refused.add(outcome.engine)
                problem = outcome.problem
        raise problem

    async def _try(
        self, group: TokenGroup, kind: Kind, route: Route
    ) -> Measurements | ProblemError | Declined | None:
        """None: the replica has died."""
        try:
            return await self._call(group, kind, route)
        except RayActorError as error:
            logger.warning("a replica is gone, its work goes to another one: %s", error)
            return None
        except BackPressureError as error:
            raise OverloadedError(str(error), retry_after_s=_RETRY_AFTER_S) from error
        except DeploymentUnavailableError as error:
            raise NotReadyError("the engines do not start", retry_after_s=_RETRY_AFTER_S) from error

    async def _call(
        self, group: TokenGroup, kind: Kind, route: Route
    ) -> Measurements | ProblemError | Declined:
        response = self._engines.measure.remote(group, kind, route)
        try:
            outcome: Measurements | ProblemError | Declined = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        return outcome
