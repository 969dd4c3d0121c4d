"""Brings every engine to the same version of the policy: one process, which all engines ask what to do.

A change is tried by one engine first. If that refuses it, nothing has changed anywhere. Else the change
stands in the history, and the others make it, too, at once or one after another. An engine that starts late
makes what the history has before it is ready; one that fails is replaced, and its successor does the same;
one that is only slow gets no work until it has caught up (`View.floor`).

If this process dies, engines go on as they are, and the next one takes over what they remember of the
history. Uploads have gone with it: no engine can start that needs them, until new weights come.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shopr1_client.errors import NotReadyError, UpdateConflictError
from shopr1_client.wire_policy import Stage, UpdateProgress
from shopr1_service.cluster.membership import Membership
from shopr1_service.cluster.messages import (
    Answer,
    Follow,
    Order,
    Outcome,
    Report,
    Retire,
    Tell,
    Trial,
    raised,
    returning_problems,
)
from shopr1_service.cluster.routing_view import View
from shopr1_service.cluster.update_log import Change, History
from shopr1_service.cluster.upload_store import Uploads
from shopr1_service.concurrency import Pulse

_RETRY_AFTER_S = 2.0
_POLL_S = 10.0
"""How long a question stays open when there is nothing to say."""
GRACE_S = 5.0
"""A journal that is new may be the successor of one whose engines have made changes: so long it waits for
them before it believes an engine that is new itself."""


@dataclass
class _Running:
    """A change that is under way.

    Attributes:
        canary: the engine that tries it.
    """

    change: Change
    canary: str = ""
    outcome: Outcome | None = None
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
    """See the module.

    Args:
        directory: of uploads.
        is_rolling: engines make a change one after another, so that the others go on scoring.
        lives: whether an engine does, by its handle.
        grace_s: see `GRACE_S`.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        is_rolling: bool,
        lives: Callable[[Any], Awaitable[bool]],
        grace_s: float = GRACE_S,
    ) -> None:
        self._is_rolling = is_rolling
        self._uploads = Uploads(directory)
        self._roster = Membership(self._tell, lives)
        self._history: History | None = None
        self._former: History | None = None
        self._held: set[str] = set()
        self._floor = 0
        self._running: _Running | None = None
        self._revision = time.time_ns()  # others than those of a journal before this one
        self._pulse = Pulse()
        self._believes_at_s = asyncio.get_running_loop().time() + grace_s

    # --- asked by engines

    async def ask(self, report: Report, *, waits: bool = True) -> Order | None:
        """What an engine has to do next; None: nothing, for now."""
        if report.known < 0:
            await self._heard_from_elders()
        self._roster.hear(report)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                while (order := self._order(report)) is None and waits and report.engine in self._roster:
                    await self._pulse.wait()
                return order
        return None

    async def adopt(self, history: History) -> None:
        """An engine's history, which goes on further than this one."""
        if self._history is None or history.number > self._history.number:
            self._history, self._floor = history, history.number
            self._tell()

    async def tried(self, engine: str, outcome: Outcome) -> None:
        """What came of a trial."""
        if self._running is not None and self._running.canary == engine:
            self._running.outcome = outcome
            self._tell()

    async def leave(self, engine: str) -> None:
        """It has failed, and will be replaced."""
        self._roster.lose(engine)

    @returning_problems
    async def read(self, upload: str, start: int, max_bytes: int) -> bytes:
        """A piece of an upload; none behind its end."""
        return await self._uploads.read(upload, start, max_bytes)

    # --- asked by HTTP sides

    async def view(self, revision: int | None = None) -> View | None:
        """As soon as it is another one than that of this revision; None: it is not, for now."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                while self._history is None or self._revision == revision:
                    await self._pulse.wait()
                return self._view(self._history)
        return None

    @returning_problems
    async def change(self, change: Change) -> Answer:
        """Make a change, everywhere or nowhere. It goes on if whoever asked for it is gone."""
        self._refuse_if_running()
        self._running = _Running(change)
        return raised(await asyncio.shield(asyncio.ensure_future(self._change(self._running))))

    @returning_problems
    async def begin(self) -> str:
        """The id of a new upload."""
        self._refuse_if_running()
        return self._uploads.begin()

    @returning_problems
    async def append(self, upload: str, piece: bytes) -> None:
        """A further piece of an upload."""
        await self._uploads.append(upload, piece)

    async def discard(self, upload: str) -> None:
        """It will not become a change."""
        self._uploads.discard(upload)

    async def _heard_from_elders(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._believes_at_s):
                await self._until(lambda: self._history is not None)

    # --- how a change is made

    def _order(self, report: Report) -> Order | None:
        history, running = self._history, self._running
        if history is None or report.known > history.number:
            return Tell()
        if running is not None and running.canary == report.engine:
            is_due = running.outcome is None and report.number <= history.number
            return Trial(history.number + 1, running.change) if is_due else None
        if report.number > history.number:
            return Retire("it has made a change that the others have not")
        if report.known < history.number:
            return None if report.engine in self._held else Follow(history)
        self._roster.enter(report.engine)
        return None

    @returning_problems
    async def _change(self, running: _Running) -> Answer:
        try:
            if running.change.upload is not None:
                self._uploads.end(running.change.upload)
            outcome = await self._try(running)
            assert self._history is not None
            self._former = self._history
            self._history = self._history.after(running.change, outcome.table, outcome.taken)
            await self._spread(running, self._history.number)
            return outcome.answer
        finally:
            self._running = self._former = None
            self._held.clear()
            self._uploads.keep_only(self._history.uploads if self._history else ())
            self._tell()

    async def _try(self, running: _Running) -> Outcome:
        """On the engine that has been there longest."""
        running.canary = next(iter(self._roster.ready), "")
        if not running.canary:
            raise NotReadyError("no engine is ready", retry_after_s=_RETRY_AFTER_S)
        self._tell()
        await self._until(lambda: running.outcome is not None or running.canary not in self._roster)
        if running.outcome is None:
            raise NotReadyError("the engine that tried it has died", retry_after_s=_RETRY_AFTER_S)
        if running.outcome.problem is not None:
            raise running.outcome.problem
        return running.outcome

    async def _spread(self, running: _Running, number: int) -> None:
        """The others make it, too."""
        self._roster.advance(running.canary, number)
        running.canary, running.stage = "", Stage.SWAPPING
        behind = [name for name, made in self._roster.ready.items() if made < number]
        self._held = set(behind) if self._is_rolling else set()
        for name in behind:
            self._held.discard(name)
            self._tell()
            await self._until(lambda name=name: self._roster.has_made(name, number))  # type: ignore[misc]
        self._floor = number

    def _refuse_if_running(self) -> None:
        if self._running is not None:
            message = f"an update to version {self._running.progress.version!r} is under way"
            raise UpdateConflictError(message, retry_after_s=_RETRY_AFTER_S)

    def _view(self, history: History) -> View:
        tables = {each.number: each.table for each in (self._former, history) if each is not None}
        progress = self._running.progress if self._running else None
        return View(self._revision, history.table, self._floor, tables, self._roster.ready, progress)

    def _tell(self) -> None:
        self._revision += 1
        self._pulse.tell()

    async def _until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            await self._pulse.wait()
