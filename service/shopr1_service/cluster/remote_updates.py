"""The policy's changes as routes ask for them, handed to the journal."""

import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from shopr1_client.errors import (
    InvalidRequestError,
    InvalidWeightsError,
    NotReadyError,
    ProblemError,
    TooLargeError,
)
from shopr1_client.wire_policy import (
    AdapterRequest,
    AdapterUpdate,
    PolicyUpdate,
    TransferRequest,
    UpdateProgress,
    UpdateRequest,
)
from shopr1_service.cluster.messages import Answer, ClusterView, raise_problem
from shopr1_service.cluster.update_log import Change, UnloadRequest
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.updates.adapter_updates import AdapterFiles
from shopr1_service.weights.safetensors_header import TensorEntry
from shopr1_service.weights.safetensors_stream import Upload

_PIECE_BYTES = 16 * 2**20
_RETRY_AFTER_S = 5.0
_UPLOADED = "-"
"""A path where there is none."""

See = Callable[[ClusterView], None]


class _HeaderOnly:
    """A `Sink` that refuses what cannot be right, before it is kept anywhere."""

    def __init__(self, max_bytes: int, too_large: type[ProblemError]) -> None:
        self._max_bytes = max_bytes
        self._too_large = too_large
        self._num_missing = 0
        self.num_bytes = 0

    def announce(self, entries: Sequence[TensorEntry]) -> None:
        self.num_bytes = self._num_missing = sum(entry.num_bytes for entry in entries)
        if self.num_bytes > self._max_bytes:
            raise self._too_large(f"{self.num_bytes} bytes of tensors, {self._max_bytes} at most")

    def feed(self, block: memoryview) -> None:
        self._num_missing -= len(block)
        if self._num_missing < 0:
            raise InvalidWeightsError(f"{-self._num_missing} bytes more than the header announces")

    def end(self) -> None:
        if self._num_missing:
            raise InvalidWeightsError(f"the weights end {self._num_missing} bytes too early")


class _Journal:
    """What both kinds of changes need of it."""

    def __init__(self, journal: Any, see: See) -> None:  # noqa: ANN401
        self._journal = journal
        self._see = see

    async def change(self, change: Change) -> Answer:
        """Returns when all engines have made it, and this process knows that.

        Raises:
            NotReadyError: the journal died; whether the change was made, `GET /policy` tells.
        """
        try:
            answer: Answer = raise_problem(await self._journal.change.remote(change))
            view = await self._journal.view.remote()
        except (RayError, RayServeException) as error:
            raise NotReadyError(
                "who brings changes to the engines has died", retry_after_s=_RETRY_AFTER_S
            ) from error
        if view is not None:
            self._see(view)
        return answer

    async def keep(
        self, stream: AsyncIterable[bytes], max_bytes: int, too_large: type[ProblemError]
    ) -> tuple[str, int]:
        """Hand over a safetensors file; its id, and the bytes of its tensors."""
        sink = _HeaderOnly(max_bytes, too_large)
        checked = Upload(sink)
        upload: str = raise_problem(await self._journal.create_upload.remote())
        try:
            async for piece in _in_pieces(stream):
                checked.feed(memoryview(piece))
                raise_problem(await self._journal.append.remote(upload, piece))
            checked.end()
        except BaseException:
            with suppress(RayError, RayServeException):
                await self._journal.delete_upload.remote(upload)
            raise
        return upload, sink.num_bytes


class FleetWeights:
    """As `Updates`, of engines elsewhere (`WeightChanges`)."""

    def __init__(
        self,
        journal: Any,  # noqa: ANN401
        view: Callable[[], ClusterView],
        see: See,
        metrics: Metrics,
        max_bytes: int,
    ) -> None:
        self._journal = _Journal(journal, see)
        self._view = view
        self._metrics = metrics.policy
        self._max_bytes = max_bytes

    @property
    def progress(self) -> UpdateProgress | None:
        return self._view().progress

    async def from_checkpoint(self, request: UpdateRequest) -> PolicyUpdate:
        """Every engine reads it for itself: it must be the same everywhere."""
        with self._recorded("checkpoint") as recorded:
            return await self._change(Change(request), recorded)

    async def from_upload(
        self, stream: AsyncIterable[bytes], version: str, *, is_partial: bool
    ) -> PolicyUpdate:
        """Kept once, and read from there by every engine."""
        with self._recorded("upload") as recorded:
            upload, recorded.num_bytes = await self._journal.keep(
                stream, self._max_bytes, InvalidWeightsError
            )
            request = UpdateRequest(path=_UPLOADED, version=version, partial=is_partial)
            return await self._change(Change(request, upload), recorded)

    async def from_trainer(self, request: TransferRequest) -> PolicyUpdate:
        """Not possible: the trainer makes a group of two, and there are more engines."""
        message = "several engines cannot join a trainer's group: send the weights, or name a checkpoint"
        raise InvalidRequestError(message)

    async def _change(self, change: Change, recorded: "_Recorded") -> PolicyUpdate:
        update = await self._journal.change(change)
        assert isinstance(update, PolicyUpdate)
        recorded.is_done, recorded.num_bytes = True, update.num_bytes
        if update.pause_s is not None:
            self._metrics.record_swap(recorded.source, update.pause_s)
        return update.model_copy(update={"duration_s": recorded.age_s})

    @contextmanager
    def _recorded(self, source: str) -> Iterator["_Recorded"]:
        recorded = _Recorded(source)
        try:
            yield recorded
        finally:
            self._metrics.record_update(source, recorded.age_s, recorded.num_bytes, is_done=recorded.is_done)


@dataclass
class _Recorded:
    """What metrics are told of an update."""

    source: str
    num_bytes: int = 0
    is_done: bool = False
    start_s: float = field(default_factory=time.perf_counter)

    @property
    def age_s(self) -> float:
        return time.perf_counter() - self.start_s


class FleetAdapters:
    """As `AdapterUpdates`, of engines elsewhere (`AdapterChanges`).

    What stands in a directory is kept like an upload: it may be another adapter when an engine starts late.
    """

    def __init__(self, journal: Any, engines: Any, see: See, max_bytes: int) -> None:  # noqa: ANN401
        self._journal = _Journal(journal, see)
        self._engines = engines
        self._max_bytes = max_bytes

    async def from_directory(self, request: AdapterRequest) -> AdapterUpdate:
        files: AdapterFiles = raise_problem(await self._engines.adapter_files.remote(request.path))
        upload, _ = await self._journal.keep(_once(files.tensors), self._max_bytes, TooLargeError)
        return await self._add(Change(request, upload, files.config))

    async def from_upload(self, stream: AsyncIterable[bytes], request: AdapterRequest) -> AdapterUpdate:
        upload, _ = await self._journal.keep(stream, self._max_bytes, TooLargeError)
        return await self._add(Change(request, upload))

    async def unload(self, name: str, version: str | None = None) -> None:
        await self._journal.change(Change(UnloadRequest(name, version)))

    async def _add(self, change: Change) -> AdapterUpdate:
        start_s = time.perf_counter()
        update = await self._journal.change(change)
        assert isinstance(update, AdapterUpdate)
        return update.model_copy(update={"duration_s": time.perf_counter() - start_s})


async def _once(block: bytes) -> AsyncIterator[bytes]:
    yield block


async def _in_pieces(stream: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Large enough to be worth a call, small enough to be copied."""
    piece = bytearray()
    async for block in stream:
        for start in range(0, len(block), _PIECE_BYTES):
            piece += block[start : start + _PIECE_BYTES]
            if len(piece) >= _PIECE_BYTES:
                yield bytes(piece)
                piece.clear()
    if piece:
        yield bytes(piece)
