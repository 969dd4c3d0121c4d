"""An engine's side of the update coordinator: polls it, and applies the changes that it orders."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from shopr1_client.errors import NotReadyError, ProblemError
from shopr1_client.wire_policy import UpdateRequest
from shopr1_service.cluster.messages import (
    Answer,
    BehindError,
    Order,
    Report,
    SendLog,
    TrialResult,
    TryUpdate,
    raise_problem,
    returns_problems,
)
from shopr1_service.cluster.update_log import Change, Entry, UnloadRequest, UpdateLog
from shopr1_service.updates.updatable_engine import UpdatableEngine
from shopr1_service.weights.samples import digest_of, sample_of
from shopr1_service.weights.tensors import UpdateContents

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 16 * 2**20
"""Size of the chunks in which an upload is read; two of them are in memory."""
_RETRY_S = 1.0
"""Wait before the coordinator is polled again after an error."""


class UpdateFollower:
    """Keeps one engine at the version of the others. Used from the event loop only.

    Args:
        coordinator: Ray's handle.
        name: name of the engine.
        actor: Ray's handle of this process.
    """

    def __init__(
        self,
        coordinator: Any,  # noqa: ANN401
        name: str,
        actor: Any,  # noqa: ANN401
        engine: UpdatableEngine,
    ) -> None:
        self._coordinator = coordinator
        self._name = name
        self._actor = actor
        self._engine = engine
        tensors = engine.policy.weights.tensors
        start = digest_of({name: sample_of(tensor) for name, tensor in tensors.items()})
        self._log = UpdateLog(engine.versions, start=start)
        self._start = start
        self._log_number = -1

    async def catch_up(self) -> None:
        """Return when the engine has the version of the others.

        Raises:
            BehindError: it cannot catch up.
        """
        while (order := await self._poll(waits=False)) is not None:
            await self._execute(order)

    async def follow(self, on_failure: Callable[[BaseException], None]) -> None:
        """Apply every change from now on, until one fails.

        Args:
            on_failure: called then; the engine must not score any more.
        """
        try:
            while True:
                order = await self._poll(waits=True)
                if order is not None:
                    await self._execute(order)
        except Exception as error:
            logger.exception("engine %s cannot follow the others, and is taken out of service", self._name)
            on_failure(error)
            await self._coordinator.deregister.remote(self._name)

    async def _poll(self, *, waits: bool) -> Order | None:
        report = Report(self._name, self._actor, self._engine.versions.num_changes, self._log_number)
        while True:
            try:
                order: Order | None = await self._coordinator.poll.remote(report, waits=waits)
            except Exception as error:  # any of Ray's: the coordinator is being replaced
                logger.warning("the update coordinator does not answer: %s", error)
                await asyncio.sleep(_RETRY_S)
            else:
                return order

    async def _execute(self, order: Order) -> None:
        match order:
            case SendLog():
                await self._coordinator.restore.remote(self._log)
                self._log_number = self._log.number
            case TryUpdate():
                await self._coordinator.report_trial.remote(self._name, await self._try(order))
            case UpdateLog():
                await self._apply_log(order)
            case BehindError():
                raise order

    @returns_problems
    async def _try(self, trial: TryUpdate) -> TrialResult:
        answer = await self._apply(trial.number, trial.change)
        taken = self._engine.weights.contents if isinstance(trial.change.request, UpdateRequest) else None
        return TrialResult(self._engine.versions, answer, taken)

    async def _apply_log(self, log: UpdateLog) -> None:
        if log.start != self._start and self._engine.policy.weights.tensors.keys() - log.replaced:
            raise BehindError("it was started with other weights than the first engine")
        for entry in log.after(self._engine.versions.num_changes):
            await self._apply_entry(entry)
        await self._engine.scheduler.between_batches(lambda: self._engine.policy.sync_versions(log.table))
        self._log, self._log_number = log, log.number

    async def _apply_entry(self, entry: Entry) -> None:
        try:
            await self._apply(entry.number, entry.change, entry.taken)
        except NotReadyError:
            raise
        except ProblemError as error:
            raise BehindError(f"change {entry.number} cannot be applied here: {error}") from error

    async def _apply(self, number: int, change: Change, taken: UpdateContents | None = None) -> Answer:
        engine, request = self._engine, change.request
        await engine.scheduler.between_batches(lambda: engine.policy.set_next_number(number))
        if isinstance(request, UnloadRequest):
            await engine.unload_adapter(request.name, request.version)
            return None
        if change.upload is None:
            assert isinstance(request, UpdateRequest)
            return await engine.weights.from_checkpoint(request, taken)
        chunks = self._chunks(change.upload)
        if isinstance(request, UpdateRequest):
            return await engine.load_upload(chunks, request.version, is_partial=request.partial)
        return await engine.adapters.from_upload(chunks, request, change.config)

    async def _chunks(self, upload: str) -> AsyncIterator[bytes]:
        start, coming = 0, self._coordinator.read.remote(upload, 0, _CHUNK_BYTES)
        while chunk := raise_problem(await coming):
            start += len(chunk)
            coming = self._coordinator.read.remote(upload, start, _CHUNK_BYTES)  # while this one is applied
            yield chunk
