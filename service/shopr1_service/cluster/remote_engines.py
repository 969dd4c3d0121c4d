"""The engines of a Ray application, as the HTTP side uses them.

Ray chooses the engine of each group. If an engine dies, its groups are sent to another one: scoring changes
nothing, so nothing is lost and nothing is counted twice. Changes of the policy go to the update coordinator.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import suppress
from contextvars import Context
from typing import Any

from prometheus_client import Metric
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from shopr1_client.errors import (
    InvalidRequestError,
    InvalidWeightsError,
    NotReadyError,
    OverloadedError,
    ProblemError,
    TooLargeError,
)
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
from shopr1_service.cluster.messages import Answer, ClusterView, Declined, Route, raise_problem
from shopr1_service.cluster.update_log import Change, UnloadRequest
from shopr1_service.core import BatchKey, GroupCertainties, Progress, TokenGroup
from shopr1_service.errors import RETRY_AFTER_S
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.prompts.tokenizer import Codec
from shopr1_service.policy.versions import VersionTable
from shopr1_service.scheduling.engine_client import EngineClient
from shopr1_service.scheduling.version_waiter import VersionWaiter
from shopr1_service.updates.adapter_updates import AdapterFiles
from shopr1_service.weights.safetensors_header import Header
from shopr1_service.weights.safetensors_stream import SafetensorsStream

logger = logging.getLogger(__name__)

_MAX_TRIES = 5
"""Number of engines that a group is sent to before it is refused."""
_SCRAPE_TIMEOUT_S = 3.0
"""Prometheus waits 10 s for the HTTP side."""
_RETRY_S = 1.0
"""Wait before the coordinator is asked again after an error."""
_CHUNK_BYTES = 16 * 2**20
"""Size of the chunks in which an upload is sent to the coordinator."""
_NO_PATH = "-"
"""Path in the request of an upload."""


class RemoteEngines(EngineClient):
    """The engines of a Ray application, whose heartbeats Ray checks.

    Args:
        engines, coordinator: Ray's handles.
    """

    def __init__(
        self,
        engines: Any,  # noqa: ANN401
        coordinator: Any,  # noqa: ANN401
        description: Description,
        view: ClusterView,
        metrics: Metrics,
    ) -> None:
        self.view = view
        self.new_versions = VersionWaiter(lambda: self.versions)
        self._engines = engines
        self._coordinator = coordinator
        self._description = description
        self._metrics = metrics.policy
        self._watching: asyncio.Task[None] | None = None
        self._metrics.record_loaded(self.info)

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

    @property
    def update_progress(self) -> UpdateProgress | None:
        return self.view.progress

    def watch(self) -> None:
        """Start to follow the coordinator's view."""
        self._watching = asyncio.create_task(self._watch())

    def close(self) -> None:
        """Stop following the coordinator. Ray ends the engines."""
        if self._watching is not None:
            self._watching.cancel()

    # --- scoring

    async def compute_certainties(
        self, groups: Sequence[TokenGroup], key: BatchKey, progress: Progress | None = None
    ) -> list[GroupCertainties]:
        """As `EngineClient`. Each group is sent separately; if one is refused, all are."""
        # In contexts of their own: otherwise all of them have the id of the HTTP request, and Ray's router
        # confuses them.
        calls = [asyncio.create_task(self._compute(group, key), context=Context()) for group in groups]
        try:
            return list(await asyncio.gather(*calls))
        finally:
            for call in calls:
                call.cancel()

    async def _compute(self, group: TokenGroup, key: BatchKey) -> GroupCertainties:
        if not group.completions:
            return GroupCertainties([], self.versions.find(key.target))
        problem: ProblemError = NotReadyError(
            f"{_MAX_TRIES} engines died while they computed it", retry_after_s=RETRY_AFTER_S
        )
        declined: set[str] = set()
        for _ in range(_MAX_TRIES):
            engines = self.view.engines_with(key.target)
            if declined and engines <= declined:
                break
            outcome = await self._call(group, key, Route(engines - declined or None, self.view.min_number))
            if isinstance(outcome, Declined):
                declined.add(outcome.engine)
                problem = outcome.problem
            elif outcome is not None:
                return raise_problem(outcome)
        raise problem

    async def _call(
        self, group: TokenGroup, key: BatchKey, route: Route
    ) -> GroupCertainties | ProblemError | Declined | None:
        """One engine's answer; None if it has died."""
        response = self._engines.compute_certainties.remote(group, key, route)
        try:
            outcome: GroupCertainties | ProblemError | Declined = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayActorError as error:
            logger.warning("an engine has died, its group is sent to another one: %s", error)
            return None
        except BackPressureError as error:
            raise OverloadedError(str(error), retry_after_s=RETRY_AFTER_S) from error
        except DeploymentUnavailableError as error:
            raise NotReadyError("the engines do not start", retry_after_s=RETRY_AFTER_S) from error
        return outcome

    # --- metrics

    async def scrape(self) -> list[Metric]:
        """Metrics of all engines, with the label `engine`. Those that do not answer are missing."""
        calls = [asyncio.create_task(self._scrape(name), context=Context()) for name in self.view.engines]
        scrapes = await asyncio.gather(*calls)
        return labelled({each.engine: each for each in scrapes if each is not None}.values())

    async def _scrape(self, engine: str) -> Scrape | None:
        try:
            async with asyncio.timeout(_SCRAPE_TIMEOUT_S):
                scrape: Scrape = await self._engines.scrape.remote(Route(frozenset({engine})))
        except (RayError, TimeoutError):  # it has died, or is busy
            return None
        return scrape

    # --- changes

    async def load_checkpoint(self, request: UpdateRequest) -> PolicyUpdate:
        """As `EngineClient`. Every engine reads the checkpoint: it must be the same file for all of them."""
        return await self._load_weights("checkpoint", request)

    async def load_upload(
        self, stream: AsyncIterable[bytes], version: str, *, is_partial: bool
    ) -> PolicyUpdate:
        """As `EngineClient`. The coordinator stores the file, and every engine reads it from there."""
        request = UpdateRequest(path=_NO_PATH, version=version, partial=is_partial)
        return await self._load_weights("upload", request, stream)

    async def receive_broadcast(self, request: TransferRequest) -> PolicyUpdate:
        """Refuse: a trainer's group has two members, and there are more engines."""
        message = "several engines cannot join a trainer's group: send the weights, or name a checkpoint"
        raise InvalidRequestError(message)

    async def load_adapter(self, request: AdapterRequest) -> AdapterUpdate:
        """As `EngineClient`. The adapter is stored like an upload, as its directory may change later."""
        files: AdapterFiles = raise_problem(await self._engines.adapter_files.remote(request.path))
        return await self._load_adapter(request, _single(files.tensors), files.config)

    async def load_uploaded_adapter(
        self, stream: AsyncIterable[bytes], request: AdapterRequest
    ) -> AdapterUpdate:
        return await self._load_adapter(request, stream)

    async def unload_adapter(self, name: str, version: str | None = None) -> None:
        await self._change(Change(UnloadRequest(name, version)))

    async def _load_weights(
        self, source: str, request: UpdateRequest, stream: AsyncIterable[bytes] | None = None
    ) -> PolicyUpdate:
        start_s, num_bytes, upload, update = time.perf_counter(), 0, None, None
        try:
            if stream is not None:
                max_bytes = self._description.max_weight_bytes
                upload, num_bytes = await self._upload(stream, max_bytes, InvalidWeightsError)
            update = await self._change(Change(request, upload))
            assert isinstance(update, PolicyUpdate)
            num_bytes = update.num_bytes
        finally:
            duration_s = time.perf_counter() - start_s
            self._metrics.record_update(source, duration_s, num_bytes, is_done=update is not None)
        if update.pause_s is not None:
            self._metrics.record_swap(source, update.pause_s)
        return update.model_copy(update={"duration_s": duration_s})

    async def _load_adapter(
        self, request: AdapterRequest, stream: AsyncIterable[bytes], config: bytes | None = None
    ) -> AdapterUpdate:
        upload, _ = await self._upload(stream, self._description.max_adapter_bytes, TooLargeError)
        start_s = time.perf_counter()
        update = await self._change(Change(request, upload, config))
        assert isinstance(update, AdapterUpdate)
        return update.model_copy(update={"duration_s": time.perf_counter() - start_s})

    async def _change(self, change: Change) -> Answer:
        """Let all engines apply a change; returns when this process has seen the result.

        Raises:
            NotReadyError: the coordinator died; `GET /policy` shows whether the change was applied.
        """
        try:
            answer: Answer = raise_problem(await self._coordinator.change.remote(change))
            view = await self._coordinator.view.remote()
        except (RayError, RayServeException) as error:
            message = "the update coordinator has died"
            raise NotReadyError(message, retry_after_s=RETRY_AFTER_S) from error
        if view is not None:
            self._see(view)
        return answer

    async def _upload(
        self, stream: AsyncIterable[bytes], max_bytes: int, too_large: type[ProblemError]
    ) -> tuple[str, int]:
        """Store a safetensors file in the coordinator; its id, and the size of its tensors in bytes."""

        def check_size(header: Header) -> None:
            if header.num_bytes > max_bytes:
                raise too_large(f"{header.num_bytes} bytes of tensors, {max_bytes} at most")

        file = SafetensorsStream(check_size, lambda _: None)
        upload: str = raise_problem(await self._coordinator.create_upload.remote())
        try:
            async for chunk in _chunks(stream):
                file.feed(memoryview(chunk))
                raise_problem(await self._coordinator.append.remote(upload, chunk))
            return upload, file.finish().num_bytes
        except BaseException:
            with suppress(RayError, RayServeException):
                await self._coordinator.delete_upload.remote(upload)
            raise

    # --- the coordinator's view

    async def _watch(self) -> None:
        while True:
            try:
                view = await self._coordinator.view.remote(self.view.revision)
            except RayError as error:
                logger.warning("the update coordinator does not answer: %s", error)
                await asyncio.sleep(_RETRY_S)
            else:
                if view is not None:
                    self._see(view)

    def _see(self, view: ClusterView) -> None:
        if view.revision < self.view.revision:  # a later answer has arrived first
            return
        is_new = view.table.num_changes != self.view.table.num_changes
        self.view = view
        if is_new:
            self._metrics.record_loaded(self.info, len(self.versions.loaded()))
        self.new_versions.notify()


async def _single(block: bytes) -> AsyncIterator[bytes]:
    yield block


async def _chunks(stream: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in chunks that are worth a call, and small enough to be copied."""
    chunk = bytearray()
    async for block in stream:
        chunk += block
        while len(chunk) >= _CHUNK_BYTES:
            yield bytes(chunk[:_CHUNK_BYTES])
            del chunk[:_CHUNK_BYTES]
    if chunk:
        yield bytes(chunk)
