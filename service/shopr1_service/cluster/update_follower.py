"""An engine's side of the journal: makes the changes that it is told to make."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from shopr1_client.errors import NotReadyError, ProblemError
from shopr1_client.wire_policy import AdapterRequest, UpdateRequest
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
)
from shopr1_service.cluster.update_log import Change, Entry, History
from shopr1_service.policy.local import LoadedPolicy
from shopr1_service.scheduling.scheduler import Scheduler
from shopr1_service.updates.adapter_updates import AdapterUpdates
from shopr1_service.updates.weight_updates import WeightUpdates
from shopr1_service.weights.files import Signature

logger = logging.getLogger(__name__)

_PIECE_BYTES = 16 * 2**20
"""Of an upload, at a time: two of them are in memory."""
_PATIENCE_S = 1.0
"""Before the journal is asked again when it did not answer."""


class BehindError(Exception):
    """The engine cannot make a change that others have made: it must be replaced."""


class Follower:
    """See the module. Used from the event loop only.

    Args:
        journal: Ray's handle.
        name: of the engine.
        actor: Ray's handle of this process.
    """

    def __init__(
        self,
        journal: Any,  # noqa: ANN401
        name: str,
        actor: Any,  # noqa: ANN401
        policy: LoadedPolicy,
        scheduler: Scheduler,
        updates: WeightUpdates,
        adapters: AdapterUpdates,
    ) -> None:
        self._journal = journal
        self._name = name
        self._actor = actor
        self._policy = policy
        self._scheduler = scheduler
        self._updates = updates
        self._adapters = adapters
        self._history = History(policy.versions)
        self._known = -1

    async def catch_up(self) -> None:
        """Return when the engine is where the others are.

        Raises:
            BehindError: it cannot be brought there.
        """
        while (order := await self._ask(waits=False)) is not None:
            await self._obey(order)

    async def follow(self, on_failure: Callable[[BaseException], None]) -> None:
        """Make every change from now on, until one fails.

        Args:
            on_failure: called then; the engine must not be asked for anything any more.
        """
        try:
            while True:
                order = await self._ask(waits=True)
                if order is not None:
                    await self._obey(order)
        except Exception as error:
            logger.exception("engine %s is out of rotation", self._name)
            on_failure(error)
            await self._journal.leave.remote(self._name)

    async def _ask(self, *, waits: bool) -> Order | None:
        report = Report(self._name, self._actor, self._policy.versions.num_changes, self._known)
        while True:
            try:
                order: Order | None = await self._journal.ask.remote(report, waits=waits)
            except Exception as error:  # whatever Ray raises: it is being replaced
                logger.warning("the journal does not answer: %s", error)
                await asyncio.sleep(_PATIENCE_S)
            else:
                return order

    async def _obey(self, order: Order) -> None:
        match order:
            case Tell():
                await self._journal.adopt.remote(self._history)
                self._known = self._history.number
            case Trial():
                await self._journal.tried.remote(self._name, await self._try(order))
            case Follow():
                await self._follow(order.history)
            case Retire():
                raise BehindError(order.why)

    async def _try(self, trial: Trial) -> Outcome:
        try:
            answer = await self._make(trial.number, trial.change)
        except ProblemError as error:
            return Outcome(self._policy.versions, problem=error)
        taken = self._updates.contents if isinstance(trial.change.request, UpdateRequest) else None
        return Outcome(self._policy.versions, answer, taken)

    async def _follow(self, history: History) -> None:
        for entry in history.missing(self._policy.versions.num_changes):
            await self._repeat(entry)
        await self._scheduler.between_batches(lambda: self._policy.sync_versions(history.table))
        self._history, self._known = history, history.number

    async def _repeat(self, entry: Entry) -> None:
        files = entry.taken.files if entry.taken and entry.taken.files else None
        try:
            await self._make(entry.number, entry.change, files)
        except NotReadyError:
            raise
        except ProblemError as error:
            raise BehindError(f"change {entry.number} cannot be made here: {error}") from error

    async def _make(self, number: int, change: Change, files: frozenset[Signature] | None = None) -> Answer:
        await self._scheduler.between_batches(lambda: self._policy.set_next_number(number))
        request = change.request
        if isinstance(request, UpdateRequest):
            if change.upload is None:
                return await self._updates.from_checkpoint(request, files)
            return await self._updates.from_upload(
                self._pieces(change.upload), request.version, is_partial=request.partial
            )
        if isinstance(request, AdapterRequest):
            assert change.upload is not None
            return await self._adapters.from_upload(self._pieces(change.upload), request, change.config)
        await self._adapters.unload(request.name, request.version)
        return None

    async def _pieces(self, upload: str) -> AsyncIterator[bytes]:
        start, coming = 0, self._journal.read.remote(upload, 0, _PIECE_BYTES)
        while piece := raised(await coming):
            start += len(piece)
            coming = self._journal.read.remote(upload, start, _PIECE_BYTES)  # while this one is being taken
            yield piece
