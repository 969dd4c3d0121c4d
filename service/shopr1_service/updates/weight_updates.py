"""Updates of the policy's weights while it serves: one at a time, each completely or not at all.

    receive   a checkpoint is opened, an upload or a broadcast written to a file; then everything is checked
    back up   the old weights are written out, unless they are in a file already
    swap      between two batches, in place; if it fails, the old weights are restored

The old weights score until the swap. An update that fails or whose sender dies leaves no trace.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from shopr1_client.errors import InvalidWeightsError, StorageError, UpdateConflictError
from shopr1_client.wire_policy import PolicyUpdate, Stage, TransferRequest, UpdateProgress, UpdateRequest
from shopr1_service.concurrency import read_foreign
from shopr1_service.errors import RETRY_UPDATE_AFTER_S
from shopr1_service.field_errors import field_problem
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.policy.versions import VersionTable
from shopr1_service.scheduling.scheduler import Scheduler
from shopr1_service.scheduling.version_waiter import VersionWaiter
from shopr1_service.settings import Settings
from shopr1_service.weights.broadcast_receiver import TransferError, receive
from shopr1_service.weights.checkpoint import CheckpointDirectory, CheckpointError
from shopr1_service.weights.compatibility import check_compatible
from shopr1_service.weights.safetensors_header import HeaderError, lay_out
from shopr1_service.weights.safetensors_stream import SafetensorsStream, feed_in_threads
from shopr1_service.weights.staging import StagedWeights
from shopr1_service.weights.tensors import TensorLocation, UpdateContents

logger = logging.getLogger(__name__)


Receive = Callable[[StagedWeights], Awaitable[None]]
"""Stages and checks all tensors of an update."""


@dataclass
class _RunningUpdate:
    version: str
    staged: StagedWeights
    stage: Stage = Stage.RECEIVING
    start_s: float = field(default_factory=time.perf_counter)
    is_done: bool = False

    @property
    def age_s(self) -> float:
        return time.perf_counter() - self.start_s

    @property
    def progress(self) -> UpdateProgress:
        return UpdateProgress(
            version=self.version,
            stage=self.stage,
            num_bytes=self.staged.num_bytes,
            num_bytes_in_all=self.staged.num_expected_bytes or None,
            age_s=self.age_s,
        )


class WeightUpdates:
    """Updates of the policy in this process. Used from the event loop only.

    Attributes:
        contents: of the last update that succeeded.

    Raises (every method that changes the policy):
        InvalidWeightsError: not weights of this policy.
        UpdateConflictError: another update is under way.
        StorageError: weights cannot be stored, or files cannot be read, or not in time.
        NotReadyError: the service is shutting down.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        scheduler: Scheduler,
        settings: Settings,
        metrics: Metrics,
        new_versions: VersionWaiter,
    ) -> None:
        self.contents: UpdateContents | None = None
        self._policy = policy
        self._scheduler = scheduler
        self._roots = settings.policy_roots
        self._read_timeout_s = settings.read_timeout_s
        self._staging_dir = settings.staging_dir
        self._metrics = metrics.policy
        self._new_versions = new_versions
        self._running: _RunningUpdate | None = None

    @property
    def progress(self) -> UpdateProgress | None:
        return self._running.progress if self._running else None

    async def from_checkpoint(
        self, request: UpdateRequest, expected: UpdateContents | None = None
    ) -> PolicyUpdate:
        """Load weights from a directory below `policy_roots`.

        Args:
            expected: contents that another engine has loaded.
        """

        async def open_files(staged: StagedWeights) -> None:
            await read_foreign(lambda: self._open(request.path, staged), self._read_timeout_s)
            if expected is not None and expected != staged.contents:
                raise InvalidWeightsError("the checkpoint was written to since another engine loaded it")

        return await self._update("checkpoint", request.version, open_files, is_partial=request.partial)

    async def from_upload(
        self, stream: AsyncIterable[bytes], version: str, *, is_partial: bool
    ) -> PolicyUpdate:
        """Load weights from a safetensors file that arrives as a stream."""

        async def write(staged: StagedWeights) -> None:
            parser = SafetensorsStream(lambda header: staged.expect(header.entries), staged.append)
            await feed_in_threads(stream, parser.feed)
            parser.finish()
            await asyncio.to_thread(staged.check)

        return await self._update("upload", version, write, is_partial=is_partial)

    async def from_trainer(self, request: TransferRequest) -> PolicyUpdate:
        """Load weights that a trainer broadcasts."""

        async def receive_broadcast(staged: StagedWeights) -> None:
            await asyncio.to_thread(self._receive, request, staged)
            await asyncio.to_thread(staged.check)

        return await self._update("transfer", request.version, receive_broadcast, is_partial=request.partial)

    async def _update(self, source: str, version: str, receive: Receive, *, is_partial: bool) -> PolicyUpdate:
        with self._only_one(source, version, is_partial=is_partial) as running:
            await receive(running.staged)
            locations = running.staged.locations
            running.stage = Stage.KEEPING
            await self._back_up(list(locations))
            running.stage = Stage.SWAPPING
            former, pause_s = await self._scheduler.between_batches(lambda: self._swap(locations, version))
            running.is_done = True
            self.contents = running.staged.contents
            self._announce(source, pause_s)
            update = PolicyUpdate(
                current=self._policy.versions.base.info,
                former=former.base.info,
                num_tensors=len(locations),
                num_bytes=running.staged.num_bytes,
                duration_s=running.age_s,
                pause_s=pause_s,
                unloaded_adapters=sorted(former.adapters),
            )
            logger.info("the policy was updated: %s", update.model_dump_json())
            return update

    async def _back_up(self, names: Sequence[str]) -> None:
        backup = self._policy.backup
        try:
            missing = await read_foreign(lambda: backup.missing(names), self._read_timeout_s)
        except (StorageError, OSError):  # a file whose state cannot be read cannot be restored from either
            missing = list(names)
        await asyncio.to_thread(backup.save, missing)

    @contextmanager
    def _only_one(self, source: str, version: str, *, is_partial: bool) -> Iterator[_RunningUpdate]:
        if self._running is not None:
            raise UpdateConflictError(
                f"an update to version {self._running.version!r} is under way",
                retry_after_s=RETRY_UPDATE_AFTER_S,
            )
        try:
            staged = StagedWeights(self._policy.weights, self._staging_dir, is_partial=is_partial)
        except StorageError:
            self._metrics.record_update(source, 0.0, 0, is_done=False)
            raise
        running = self._running = _RunningUpdate(version, staged)
        try:
            yield running
        except Exception as error:
            if not running.is_done:  # after a cancellation, a thread may still be writing
                staged.discard()
            if isinstance(error, OSError):
                raise StorageError(f"the weights cannot be read: {error.strerror or error}") from error
            raise
        finally:
            self._running = None
            self._metrics.record_update(source, running.age_s, staged.num_bytes, is_done=running.is_done)
            if not running.is_done:
                logger.warning("version %r was not loaded; failed in stage %r", version, running.stage.value)

    def _swap(self, locations: Mapping[str, TensorLocation], version: str) -> tuple[VersionTable, float]:
        """Former versions, and the pause of scoring, s. Runs on the engine's thread."""
        former, start_s = self._policy.versions, time.perf_counter()
        self._policy.replace_weights(locations, version)
        return former, time.perf_counter() - start_s

    def _announce(self, source: str, pause_s: float) -> None:
        self._metrics.record_swap(source, pause_s)
        self._metrics.record_loaded(self._policy.info)  # no adapters: they belonged to the old weights
        self._new_versions.notify()

    def _open(self, path: str, staged: StagedWeights) -> None:
        policy = self._policy
        try:
            checkpoint = CheckpointDirectory(path, self._roots)
            with checkpoint.unchanged():
                check_compatible(checkpoint, policy.model.config, policy.codec.tokenizer, self._staging_dir)
                staged.refer(checkpoint.weights())
                staged.check()
        except CheckpointError as error:
            raise field_problem(InvalidWeightsError, error.location, str(error)) from error

    def _receive(self, request: TransferRequest, staged: StagedWeights) -> None:
        try:
            staged.expect(lay_out((each.name, each.dtype, each.shape) for each in request.tensors))
            receive(request, self._policy.model.device, staged.append)
        except (HeaderError, TransferError) as error:
            raise InvalidWeightsError(f"the transfer failed: {error}") from error
