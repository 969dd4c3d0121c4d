"""The same request again is not computed again: clients repeat what they think is lost.

A request whose twin is being worked on gets the twin's answer. One whose twin was answered of late gets that
answer. What both have in common is the key: the groups, the recipe, the policy version, the run. Neither
errors nor answers with a rollout that could not be scored are kept: the next try may succeed.

When the last who waits has gone, work that still waits for the engine is dropped. What the engine has begun
is finished and kept: whoever gave up too early will ask again.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from shopr1_client.wire import ScoreResponse, Status
from shopr1_service.core import Progress
from shopr1_service.monitoring.metrics import Metrics

KEEP_S = 600.0
"""Longer than any trainer goes on repeating one request."""
MAX_KEPT_ROLLOUTS = 65_536

Start = Callable[[Progress], Awaitable[ScoreResponse]]


@dataclass
class _Flight:
    """Work in progress."""

    task: "asyncio.Future[ScoreResponse]"
    progress: Progress
    num_waiting: int = 0


@dataclass(frozen=True)
class _Kept:
    answer: ScoreResponse
    until_s: float

    @property
    def num_rollouts(self) -> int:
        return sum(len(group.rewards) for group in self.answer.groups)


class RequestDeduplicator:
    """See the module. Used from the event loop only."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._flights: dict[bytes, _Flight] = {}
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # the oldest first
        self._num_kept_rollouts = 0

    async def score(self, key: bytes, start: Start) -> ScoreResponse:
        """The answer of a twin, if there is one, else what `start` gives."""
        self._forget_old()
        if (kept := self._kept.get(key)) is not None:
            self._metrics.record_repeat("answered")
            return kept.answer
        flight = self._flights.get(key)
        if flight is None:
            progress = Progress()
            flight = _Flight(asyncio.ensure_future(start(progress)), progress)
            self._flights[key] = flight
            flight.task.add_done_callback(lambda task: self._land(key, flight, task))
        else:
            self._metrics.record_repeat("joined")
        return await self._wait(key, flight)

    async def _wait(self, key: bytes, flight: _Flight) -> ScoreResponse:
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.num_waiting -= 1
            if not (flight.num_waiting or flight.task.done() or flight.progress.has_begun):
                # At once: who comes now must not wait for what is being cancelled.
                self._flights.pop(key, None)
                flight.task.cancel()

    def _land(self, key: bytes, flight: _Flight, task: "asyncio.Future[ScoreResponse]") -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        # Asked for the exception, asyncio does not complain that nobody did.
        if not task.cancelled() and task.exception() is None and _is_scored(task.result()):
            self._keep(key, _Kept(task.result(), time.monotonic() + KEEP_S))

    def _keep(self, key: bytes, kept: _Kept) -> None:
        self._kept[key] = kept
        self._num_kept_rollouts += kept.num_rollouts
        while self._num_kept_rollouts > MAX_KEPT_ROLLOUTS:
            self._forget_oldest()

    def _forget_old(self) -> None:
        now_s = time.monotonic()
        while self._kept and next(iter(self._kept.values())).until_s <= now_s:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, kept = self._kept.popitem(last=False)
        self._num_kept_rollouts -= kept.num_rollouts


def _is_scored(answer: ScoreResponse) -> bool:
    return all(reward.status is Status.SCORED for group in answer.groups for reward in group.rewards)
