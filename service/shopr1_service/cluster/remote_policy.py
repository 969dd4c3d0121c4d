"""Engines behind a Ray Serve handle.

Ray chooses the replica of each group. When a replica dies, what it was measuring is sent to another one:
measuring changes nothing, so that nothing is lost and nothing is counted twice.
"""

import asyncio
import logging
from collections.abc import AsyncIterable, Sequence
from contextvars import Context
from typing import Any

from prometheus_client import Metric
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from shopr1_client.errors import NotReadyError, OverloadedError, ProblemError
from shopr1_client.wire import PolicyInfo
from shopr1_client.wire_policy import (
    AdapterRequest,
    AdapterUpdate,
    PolicyUpdate,
    TransferRequest,
    UpdateProgress,
    UpdateRequest,
)
from shopr1_service.cluster.engine_metrics import Scrape, labelled
from shopr1_service.cluster.engine_replica import Description
from shopr1_service.cluster.messages import ClusterView, Declined, Route
from shopr1_service.cluster.remote_updates import FleetAdapters, FleetWeights
from shopr1_service.core import Kind, Measurements, Progress, TokenGroup
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.tokenizer import Codec
from shopr1_service.policy.versions import VersionTable
from shopr1_service.scheduling.engine_client import EngineClient
from shopr1_service.scheduling.version_waiter import VersionWaiter

logger = logging.getLogger(__name__)

_NUM_TRIES = 5
"""Of a group: so many replicas may die under it."""
_RETRY_AFTER_S = 5.0
_SCRAPE_S = 3.0
"""Prometheus waits for 10 s, for all of them."""
_PATIENCE_S = 1.0
"""Before the journal is asked again when it did not answer."""


class RemoteEngines(EngineClient):
    """The engines of a Ray application, whose heartbeats Ray checks.

    Args:
        engines: Ray's handle of them.
        journal: and of the journal.
    """

    def __init__(
        self,
        engines: Any,  # noqa: ANN401
        journal: Any,  # noqa: ANN401
        description: Description,
        view: ClusterView,
        metrics: Metrics,
    ) -> None:
        self.view = view
        self.new_versions = VersionWaiter(lambda: self.versions)
        self._engines = engines
        self._journal = journal
        self._description = description
        self._metrics = metrics
        self._weights = FleetWeights(
            journal, lambda: self.view, self._see, metrics, description.max_weight_bytes
        )
        self._adapters = FleetAdapters(journal, engines, self._see, description.max_adapter_bytes)
        self._watching: asyncio.Task[None] | None = None
        metrics.policy.record_loaded(self.info)

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

    def watch(self) -> None:
        """Begin to follow the journal."""
        self._watching = asyncio.create_task(self._watch())

    async def compute_certainties(
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
        """Metrics of all engines, with the label `engine`. Those that do not answer are missing."""
        calls = [asyncio.create_task(self._scrape(name), context=Context()) for name in self.view.engines]
        scrapes = await asyncio.gather(*calls)
        return labelled({each.engine: each for each in scrapes if each is not None}.values())

    @property
    def update_progress(self) -> UpdateProgress | None:
        return self._weights.progress

    async def load_checkpoint(self, request: UpdateRequest) -> PolicyUpdate:
        return await self._weights.from_checkpoint(request)

    async def load_upload(
        self, stream: AsyncIterable[bytes], version: str, *, is_partial: bool
    ) -> PolicyUpdate:
        return await self._weights.from_upload(stream, version, is_partial=is_partial)

    async def receive_broadcast(self, request: TransferRequest) -> PolicyUpdate:
        return await self._weights.from_trainer(request)

    async def load_adapter(self, request: AdapterRequest) -> AdapterUpdate:
        return await self._adapters.from_directory(request)

    async def load_uploaded_adapter(
        self, stream: AsyncIterable[bytes], request: AdapterRequest
    ) -> AdapterUpdate:
        return await self._adapters.from_upload(stream, request)

    async def unload_adapter(self, name: str, version: str | None = None) -> None:
        await self._adapters.unload(name, version)

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

    async def _watch(self) -> None:
        """Follow what the journal knows."""
        while True:
            try:
                view = await self._journal.view.remote(self.view.revision)
            except RayError as error:  # it is being replaced
                logger.warning("the journal does not answer: %s", error)
                await asyncio.sleep(_PATIENCE_S)
            else:
                if view is not None:
                    self._see(view)

    def _see(self, view: ClusterView) -> None:
        if view.revision < self.view.revision:  # an answer that was overtaken by a later one
            return
        is_new = view.table.num_changes != self.view.table.num_changes
        self.view = view
        if is_new:
            self._metrics.policy.record_loaded(self.info, len(self.versions.loaded()))
        self.new_versions.notify()

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
