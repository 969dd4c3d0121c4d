"""One process that brings every engine to the same version of the policy; all engines poll it.

A change is tried by one engine first, the canary. If that refuses it, nothing changes anywhere. Otherwise the
change is appended to the log, and the other engines apply it, all at once or one after another. An engine
that starts late applies the log before it is ready. One that fails is replaced, and its successor does the
same. One that is only slow gets no work until it has caught up (`ClusterView.min_number`).

If this process dies, engines continue to score, and its successor takes over the log of an engine. Uploads
are lost then: no engine that needs them can start until all weights are replaced.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shopr1_client.errors import NotReadyError, ProblemError, UpdateConflictError
from shopr1_client.wire_policy import Stage, UpdateProgress
from shopr1_service.cluster.messages import (
    Answer,
    BehindError,
    ClusterView,
    Order,
    Report,
    SendLog,
    TrialResult,
    TryUpdate,
    raise_problem,
    returns_problems,
)
from shopr1_service.cluster.update_log import Change, UpdateLog
from shopr1_service.cluster.upload_store import UploadStore
from shopr1_service.errors import RETRY_UPDATE_AFTER_S

logger = logging.getLogger(__name__)

_POLL_S = 10.0
"""A poll is answered after this time at the latest."""
_LIVENESS_S = 2.0
"""Interval of liveness checks."""
GRACE_S = 5.0
"""Time that a new coordinator waits for engines with a log of its predecessor, before it takes that of an
engine that is new, too."""

IsAlive = Callable[[Any], Awaitable[bool]]


@dataclass
class _Member:
    """An engine, the number of the last change that it has applied, and whether it has caught up once."""

    actor: Any
    number: int
    is_ready: bool = False


class Membership:
    """The engines that exist.

    Args:
        on_change: called when they have changed.
        is_alive: checks an engine's process by its handle.
    """

    def __init__(self, on_change: Callable[[], None], is_alive: IsAlive) -> None:
        self._on_change = on_change
        self._is_alive = is_alive
        self._members: dict[str, _Member] = {}
        self._watching: asyncio.Task[None] | None = None

    def __contains__(self, engine: str) -> bool:
        return engine in self._members

    @property
    def ready(self) -> Mapping[str, int]:
        """The engines that receive work, oldest first, and the number of the last change of each."""
        return {engine: member.number for engine, member in self._members.items() if member.is_ready}

    def heartbeat(self, report: Report) -> None:
        """Add an engine, or update its state."""
        self._watching = self._watching or asyncio.create_task(self._watch())
        member = self._members.setdefault(report.engine, _Member(report.actor, report.log_number))
        if member.number < report.log_number:
            member.number = report.log_number
            self._on_change()

    def mark_ready(self, engine: str) -> None:
        """Record that an engine has caught up."""
        member = self._members.get(engine)
        if member is not None and not member.is_ready:
            member.is_ready = True
            self._on_change()

    def remove(self, engine: str) -> None:
        """Remove an engine that has died or failed."""
        if self._members.pop(engine, None) is not None:
            logger.warning("engine %s has died or failed", engine)
            self._on_change()

    def has_applied(self, engine: str, number: int) -> bool:
        """Whether an engine has applied a change, or has died: then its successor will apply it."""
        return engine not in self._members or self._members[engine].number >= number

    def close(self) -> None:
        """Stop the liveness checks."""
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LIVENESS_S)
            actors = {engine: member.actor for engine, member in self._members.items()}
            alive = await asyncio.gather(*map(self._is_alive, actors.values()))
            for engine, is_alive in zip(actors, alive, strict=True):
                if not is_alive:
                    self.remove(engine)


@dataclass
class _Running:
    """A change that is under way, and the engine that tries it."""

    change: Change
    canary: str = ""
    result: TrialResult | ProblemError | None = None
    stage: Stage = Stage.RECEIVING
    start_s: float = field(default_factory=time.perf_counter)

    @property
    def progress(self) -> UpdateProgress:
        return UpdateProgress(
            version=self.change.request.version or "",
            stage=self.stage,
            num_bytes=0,
            num_bytes_in_all=None,
            age_s=time.perf_counter() - self.start_s,
        )


class UpdateCoordinator:
    """Decides which change each engine applies next.

    Args:
        directory: directory of uploads.
        is_rolling: engines apply a change one after another, so that the others continue to score.
        is_alive: checks an engine's process by its handle.
    """

    def __init__(
        self, directory: Path | None, *, is_rolling: bool, is_alive: IsAlive, grace_s: float = GRACE_S
    ) -> None:
        self._is_rolling = is_rolling
        self._uploads = UploadStore(directory)
        self._members = Membership(self._notify, is_alive)
        self._log: UpdateLog | None = None
        self._former: UpdateLog | None = None
        self._held: set[str] = set()
        self._min_number = 0
        self._running: _Running | None = None
        self._revision = time.time_ns()  # higher than those of its predecessor
        self._changed = asyncio.Event()
        self._grace_end_s = asyncio.get_running_loop().time() + grace_s

    # --- called by engines

    async def poll(self, report: Report, *, waits: bool = True) -> Order | None:
        """Return an engine's next step, as soon as there is one; None after `_POLL_S`, or if not `waits`."""
        if report.log_number < 0:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._grace_end_s):
                    await self._until(lambda: self._log is not None)
        self._members.heartbeat(report)
        with suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                while (
                    (order := self._next_order(report)) is None and waits and report.engine in self._members
                ):
                    await self._changed.wait()
                return order
        return None

    async def restore(self, log: UpdateLog) -> None:
        """Take over the log of an engine, if it is later than the coordinator's own."""
        if self._log is None or log.number > self._log.number:
            self._log, self._min_number = log, log.number
            self._notify()

    async def report_trial(self, engine: str, result: TrialResult | ProblemError) -> None:
        """Record the result of a `TryUpdate`."""
        if self._running is not None and self._running.canary == engine:
            self._running.result = result
            self._notify()

    async def deregister(self, engine: str) -> None:
        """Send no more work to an engine, as it has failed."""
        self._members.remove(engine)

    @returns_problems
    async def read(self, upload: str, start: int, max_bytes: int) -> bytes:
        """Read a chunk of an upload; an empty one is the end."""
        return await self._uploads.read(upload, start, max_bytes)

    # --- called by the HTTP side

    async def view(self, revision: int | None = None) -> ClusterView | None:
        """Return the view as soon as it differs from that revision; None if it does not within `_POLL_S`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                while self._log is None or self._revision == revision:
                    await self._changed.wait()
                return self._view(self._log)
        return None

    async def change(self, change: Change) -> Answer | ProblemError:
        """Apply a change on all engines or on none. It continues if the caller disconnects."""
        return await asyncio.shield(asyncio.ensure_future(self._change(change)))

    @returns_problems
    async def create_upload(self) -> str:
        """Create an upload, and return its id."""
        self._refuse_if_running()
        return self._uploads.create()

    @returns_problems
    async def append(self, upload: str, chunk: bytes) -> None:
        """Append a chunk to an upload."""
        await self._uploads.append(upload, chunk)

    async def delete_upload(self, upload: str) -> None:
        """Delete an upload that does not become a change."""
        self._uploads.delete(upload)

    # --- how a change is applied

    def _next_order(self, report: Report) -> Order | None:
        log, running = self._log, self._running
        if log is None or report.log_number > log.number:
            return SendLog()
        if running is not None and running.canary == report.engine:
            return TryUpdate(log.number + 1, running.change) if running.result is None else None
        if report.number > log.number:
            return BehindError("it has applied a change that the others have not")
        if report.log_number < log.number:
            return None if report.engine in self._held else log
        self._members.mark_ready(report.engine)
        return None

    @returns_problems
    async def _change(self, change: Change) -> Answer:
        self._refuse_if_running()
        running = self._running = _Running(change)
        try:
            if change.upload is not None:
                self._uploads.complete(change.upload)
            result = await self._try(running)
            assert self._log is not None
            self._former = self._log
            self._log = self._log.append(change, result.table, result.taken)
            await self._spread(running, self._log.number)
            return result.answer
        finally:
            self._running = self._former = None
            self._held.clear()
            self._uploads.prune(self._log.uploads if self._log else ())
            self._notify()

    async def _try(self, running: _Running) -> TrialResult:
        """Apply a change on the oldest engine."""
        running.canary = next(iter(self._members.ready), "")
        if not running.canary:
            raise NotReadyError("no engine is ready", retry_after_s=RETRY_UPDATE_AFTER_S)
        self._notify()
        await self._until(lambda: running.result is not None or running.canary not in self._members)
        if running.result is None:
            raise NotReadyError(
                "the engine that tried the change has died", retry_after_s=RETRY_UPDATE_AFTER_S
            )
        return raise_problem(running.result)

    async def _spread(self, running: _Running, number: int) -> None:
        """Send the log with the change to all engines; to the canary, too, which has only to confirm it."""
        running.canary, running.stage = "", Stage.SWAPPING
        behind = [engine for engine, applied in self._members.ready.items() if applied < number]
        self._held = set(behind) if self._is_rolling else set()
        for engine in behind:
            self._held.discard(engine)
            self._notify()
            await self._until(lambda engine=engine: self._members.has_applied(engine, number))  # type: ignore[misc]
        self._min_number = number

    def _refuse_if_running(self) -> None:
        if self._running is not None:
            message = f"an update to version {self._running.progress.version!r} is under way"
            raise UpdateConflictError(message, retry_after_s=RETRY_UPDATE_AFTER_S)

    def _view(self, log: UpdateLog) -> ClusterView:
        tables = {each.number: each.table for each in (self._former, log) if each is not None}
        progress = self._running.progress if self._running else None
        return ClusterView(self._revision, log.table, self._min_number, tables, self._members.ready, progress)

    def _notify(self) -> None:
        self._revision += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            await self._changed.wait()
