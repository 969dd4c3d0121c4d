"""Changes of the policy's weights while it serves: one at a time, all of an update or nothing of it.

    come in      from a checkpoint, an upload or a trainer's broadcast; checked and kept in a private file
    keep         the old weights are written down, unless they are already
    swap         between two batches, in place; if it fails, the old weights come back

The old weights score until the swap. Whatever fails before it, or the sender's death, leaves no trace.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from shopr1_client.errors import InvalidWeightsError, StorageError, UpdateConflictError
from shopr1_client.wire_policy import PolicyUpdate, TransferRequest, UpdateProgress, UpdateRequest
from shopr1_client.wire_policy import Stage as StageName
from shopr1_service.concurrency import read_foreign
from shopr1_service.field_errors import field_problem
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.local import LoadedPolicy
from shopr1_service.policy.versions import VersionTable
from shopr1_service.scheduling.scheduler import Scheduler
from shopr1_service.scheduling.version_waiter import VersionWaiter
from shopr1_service.settings import Settings
from shopr1_service.weights.broadcast_receiver import TransferError, receive
from shopr1_service.weights.checkpoint import Checkpoint, CheckpointError, open_checkpoint, open_regular
from shopr1_service.weights.compatibility import check_compatible
from shopr1_service.weights.files import CheckpointFile, Signature
from shopr1_service.weights.safetensors_header import DTYPES, TensorEntry
from shopr1_service.weights.safetensors_stream import Upload, pour
from shopr1_service.weights.staging import Stage
from shopr1_service.weights.tensors import Stored, Taken

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 2.0

Fill = Callable[[Stage], Awaitable[None]]
"""Brings all tensors of an update, and finishes."""


@dataclass
class _Running:
    """An update that is under way."""

    version: str
    stage: Stage
    name: StageName = StageName.RECEIVING
    start_s: float = field(default_factory=time.perf_counter)
    is_done: bool = False

    @property
    def age_s(self) -> float:
        return time.perf_counter() - self.start_s

    @property
    def progress(self) -> UpdateProgress:
        return UpdateProgress(
            version=self.version,
            stage=self.name,
            num_bytes=self.stage.num_bytes,
            num_bytes_in_all=self.stage.num_announced_bytes or None,
            age_s=self.age_s,
        )


class Updates:
    """See the module. Used from the event loop only.

    Raises (every method that changes the policy):
        InvalidWeightsError: these are no weights of this policy.
        UpdateConflictError: another update is under way.
        StorageError: they cannot be kept, or their files not be read, or not in time.
        NotReadyError: the service ends.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        scheduler: Scheduler,
        settings: Settings,
        metrics: Metrics,
        new_versions: VersionWaiter,
    ) -> None:
        self._policy = policy
        self._scheduler = scheduler
        self._roots = settings.policy_roots
        self._read_timeout_s = settings.read_timeout_s
        self._staging_dir = settings.staging_dir
        self._metrics = metrics.policy
        self._new_versions = new_versions
        self._running: _Running | None = None
        self.taken: Taken | None = None
        """By the last update that changed the policy."""

    @property
    def progress(self) -> UpdateProgress | None:
        return self._running.progress if self._running else None

    async def from_checkpoint(
        self, request: UpdateRequest, files: frozenset[Signature] | None = None
    ) -> PolicyUpdate:
        """Take the weights of a directory below `policy_roots`.

        Args:
            files: those that it must have.
        """

        async def fill(stage: Stage) -> None:
            await read_foreign(lambda: self._read(request.path, stage), self._read_timeout_s)
            if files is not None and files != Taken.of(stage.stored).files:
                raise InvalidWeightsError("the checkpoint has been written to since it was taken elsewhere")

        return await self._update("checkpoint", request.version, fill, is_partial=request.partial)

    async def from_upload(
        self, stream: AsyncIterable[bytes], version: str, *, is_partial: bool
    ) -> PolicyUpdate:
        """Take the weights of a safetensors file that comes as a stream."""

        async def fill(stage: Stage) -> None:
            upload = Upload(stage)
            await pour(stream, upload.feed)
            upload.end()
            await asyncio.to_thread(stage.finish)

        return await self._update("upload", version, fill, is_partial=is_partial)

    async def from_trainer(self, request: TransferRequest) -> PolicyUpdate:
        """Take the weights that a trainer broadcasts."""

        async def fill(stage: Stage) -> None:
            stage.announce(_entries(request))
            await asyncio.to_thread(self._receive, request, stage)
            await asyncio.to_thread(stage.finish)

        return await self._update("transfer", request.version, fill, is_partial=request.partial)

    async def _update(self, source: str, version: str, fill: Fill, *, is_partial: bool) -> PolicyUpdate:
        with self._only_one(source, version, is_partial=is_partial) as running:
            await fill(running.stage)
            stored = running.stage.stored
            running.name = StageName.KEEPING
            await self._keep_old(list(stored))
            running.name = StageName.SWAPPING
            former, pause_s = await self._scheduler.between_batches(lambda: self._swap(stored, version))
            running.is_done = True
            self.taken = Taken.of(stored)
            self._tell(source, pause_s)
            update = PolicyUpdate(
                current=self._policy.versions.base.info,
                former=former.base.info,
                num_tensors=len(stored),
                num_bytes=running.stage.num_bytes,
                duration_s=running.age_s,
                pause_s=pause_s,
                unloaded_adapters=sorted(former.adapters),
            )
            logger.info("the policy has changed: %s", update.model_dump_json())
            return update

    async def _keep_old(self, names: Sequence[str]) -> None:
        way_back = self._policy.way_back
        try:
            missing = await read_foreign(lambda: way_back.missing(names), self._read_timeout_s)
        except (StorageError, OSError):  # a file that does not say whether it is there is not read, either
            missing = list(names)
        await asyncio.to_thread(way_back.keep, missing)

    @contextmanager
    def _only_one(self, source: str, version: str, *, is_partial: bool) -> Iterator[_Running]:
        if self._running is not None:
            raise UpdateConflictError(
                f"an update to version {self._running.version!r} is under way", retry_after_s=_RETRY_AFTER_S
            )
        try:
            stage = Stage(self._policy.weights, self._staging_dir, is_partial=is_partial)
        except StorageError:
            self._metrics.record_update(source, 0.0, 0, is_done=False)
            raise
        running = self._running = _Running(version, stage)
        try:
            yield running
        except Exception as error:
            if not running.is_done:  # when it is cancelled instead, a thread may still be writing
                stage.discard()
            if isinstance(error, OSError):
                raise StorageError(f"the weights cannot be read: {error.strerror or error}") from error
            raise
        finally:
            self._running = None
            self._metrics.record_update(source, running.age_s, stage.num_bytes, is_done=running.is_done)
            if not running.is_done:
                logger.warning("version %r was not taken, in the stage %r", version, running.name.value)

    def _swap(self, stored: Mapping[str, Stored], version: str) -> tuple[VersionTable, float]:
        """On the engine's thread. What was loaded before, and how long nothing was scored."""
        former, start_s = self._policy.versions, time.perf_counter()
        self._policy.replace_weights(stored, version)
        return former, time.perf_counter() - start_s

    def _tell(self, source: str, pause_s: float) -> None:
        self._metrics.record_swap(source, pause_s)
        # Adapters have gone with the old ones.
        self._metrics.record_loaded(self._policy.info)
        self._new_versions.notify()

    def _read(self, path: str, stage: Stage) -> None:
        try:
            checkpoint = open_checkpoint(path, self._roots)
            check_compatible(checkpoint.directory, self._policy.model.config, self._policy.codec.tokenizer)
            stage.announce(list(checkpoint.entries))
            _refer_to_all(checkpoint, stage)
            stage.finish()
        except CheckpointError as error:
            raise field_problem(InvalidWeightsError, error.location, str(error)) from error

    def _receive(self, request: TransferRequest, stage: Stage) -> None:
        try:
            receive(request, self._policy.model.device, stage.feed)
        except TransferError as error:
            raise InvalidWeightsError(f"the transfer failed: {error}") from error


def _refer_to_all(checkpoint: Checkpoint, stage: Stage) -> None:
    for shard in checkpoint.shards:
        with open_regular(shard.path) as file:
            stage.refer(CheckpointFile(file), shard.data_start, shard.header.entries)
    stage.end()


def _entries(request: TransferRequest) -> list[TensorEntry]:
    entries, start = [], 0
    for tensor in request.tensors:
        num_bytes = DTYPES[tensor.dtype].itemsize
        for length in tensor.shape:
            num_bytes *= length
        entries.append(
            TensorEntry(tensor.name, DTYPES[tensor.dtype], tuple(tensor.shape), start, start + num_bytes)
        )
        start += num_bytes
    return entries
