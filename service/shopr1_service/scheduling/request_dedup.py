"""Deduplication of work: requests with the same content are computed once.

A request with the content of one in progress, or of one that was answered recently, gets the same response.
The key is made of groups, recipe, policy version and run. Errors and responses with a rollout that could not
be scored are not kept: the next try may succeed. Each request counts as a sample of its own
(`counted_requests.py`): many samples of a policy are equal.

When the last client has disconnected, queued work is dropped. Work that the engine has started is finished
and kept: a client that gave up too early will ask again.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from shopr1_client.wire import Status
from shopr1_service.core import Progress, ScoredRequest
from shopr1_service.memory.budget import Account, Hold
from shopr1_service.memory.sizes import scored_bytes
from shopr1_service.monitoring.metrics import Metrics

KEEP_S = 600.0
"""Longer than any trainer repeats one request."""

Start = Callable[[Progress], Awaitable[ScoredRequest]]


@dataclass
class _InProgress:
    """A request in progress, and the number of clients that wait for it."""

    task: "asyncio.Future[ScoredRequest]"
    progress: Progress
    num_clients: int = 0


@dataclass(frozen=True)
class _Kept:
    scored: ScoredRequest
    until_s: float
    memory: Hold


class RequestDeduplicator:
    """Responses in progress and recent ones, by key. Used from the event loop only."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._running: dict[bytes, _InProgress] = {}
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # oldest first
        self._memory = metrics.memory
        self._memory.evict_with(self._evict)

    async def score(self, key: bytes, start: Start) -> ScoredRequest:
        """The result for a request with the same content, if there is one, else the result of `start`."""
        self._forget_old()
        if (kept := self._kept.get(key)) is not None:
            self._metrics.record_repeat("answered")
            return kept.scored
        running = self._running.get(key)
        if running is None:
            progress = Progress()
            running = _InProgress(asyncio.ensure_future(start(progress)), progress)
            self._running[key] = running
            running.task.add_done_callback(lambda task: self._finish(key, running, task))
        else:
            self._metrics.record_repeat("joined")
        return await self._wait(key, running)

    async def _wait(self, key: bytes, running: _InProgress) -> ScoredRequest:
        running.num_clients += 1
        try:
            return await asyncio.shield(running.task)
        finally:
            running.num_clients -= 1
            if not (running.num_clients or running.task.done() or running.progress.has_started):
                # At once: the next request must not wait for the cancelled task.
                self._running.pop(key, None)
                running.task.cancel()

    def _finish(self, key: bytes, running: _InProgress, task: "asyncio.Future[ScoredRequest]") -> None:
        if self._running.get(key) is running:
            del self._running[key]
        # Reading the exception keeps asyncio from warning that it was never retrieved.
        if not task.cancelled() and task.exception() is None and _is_scored(task.result()):
            self._keep(key, task.result())

    def _keep(self, key: bytes, scored: ScoredRequest) -> None:
        """Keep a result if there is memory; beyond the share of kept results the oldest ones go."""
        num_bytes, max_bytes = scored_bytes(scored), self._memory.max_answers_bytes
        if num_bytes > max_bytes:
            return
        while self._memory.num_bytes(Account.ANSWERS) + num_bytes > max_bytes:
            self._forget_oldest()
        memory = self._memory.try_hold(Account.ANSWERS, num_bytes)
        if memory is not None:
            self._kept[key] = _Kept(scored, time.monotonic() + KEEP_S, memory)

    def _evict(self) -> bool:
        if self._kept:
            self._forget_oldest()
            return True
        return False

    def _forget_old(self) -> None:
        now_s = time.monotonic()
        while self._kept and next(iter(self._kept.values())).until_s <= now_s:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, kept = self._kept.popitem(last=False)
        kept.memory.release()


def _is_scored(scored: ScoredRequest) -> bool:
    return all(reward.status is Status.SCORED for group in scored.response.groups for reward in group.rewards)
