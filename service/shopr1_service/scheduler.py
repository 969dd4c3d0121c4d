"""The engine's thread and the queue before it.

Work is taken in the order of its arrival, at once when the engine is idle. Groups that wait and have the
same prompt and the same rules are measured together: trainers that send one rollout per request send them in
bursts, and a burst costs little more than one request with all of them.

The thread survives whatever a policy raises, and drops work whose request has gone.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.engine import Certainty, TokenGroup, Unmeasurable
from shopr1_service.metrics import Metrics, Phase
from shopr1_service.policy import Policy

Measurements = Sequence[Certainty | Unmeasurable]

MAX_JOINED_COMPLETIONS = 1024
"""How many completions are measured together: the first should not wait for all of a long queue."""


@dataclass(frozen=True, eq=False)
class _Job:
    group: TokenGroup
    rules: SelfCertaintyRecipe
    future: Future[Measurements] = field(default_factory=Future)
    submitted_s: float = field(default_factory=time.perf_counter)

    def joins(self, other: "_Job") -> bool:
        return self.rules == other.rules and self.group.prompt_ids == other.group.prompt_ids


class Scheduler:
    """Measures groups, one batch at a time, on a thread of its own."""

    def __init__(self, policy: Policy, metrics: Metrics) -> None:
        self._policy = policy
        self._metrics = metrics
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()  # guards the two around it
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def measure(self, group: TokenGroup, rules: SelfCertaintyRecipe) -> Measurements:
        """Measurements of a group's completions, in order. A cancelled call's work is dropped if it waits."""
        if not group.completions:
            return []
        job = _Job(TokenGroup(tuple(group.prompt_ids), group.completions), rules)
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the scheduler is closed")
            self._jobs.append(job)
            self._changed.notify()
        return await asyncio.wrap_future(job.future)

    def close(self) -> None:
        """End the thread after what it is doing; what waits is cancelled."""
        with self._changed:
            self._is_closed = True
            for job in self._jobs:
                job.future.cancel()
            self._jobs.clear()
            self._changed.notify()

    def _run(self) -> None:
        while batch := self._take():
            running = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if running:
                self._measure(running)

    def _take(self) -> list[_Job]:
        """The oldest job and those that join it; nothing once the scheduler is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            batch: list[_Job] = []
            waiting: deque[_Job] = deque()
            num_completions = 0
            for job in self._jobs:
                fits = num_completions + len(job.group.completions) <= MAX_JOINED_COMPLETIONS
                if not batch or (fits and job.joins(batch[0])):
                    batch.append(job)
                    num_completions += len(job.group.completions)
                else:
                    waiting.append(job)
            self._jobs = waiting
            return batch

    def _measure(self, batch: Sequence[_Job]) -> None:
        now_s = time.perf_counter()
        for job in batch:
            self._metrics.record_phase(Phase.QUEUE, now_s - job.submitted_s)
        completions = [completion for job in batch for completion in job.group.completions]
        try:
            with self._metrics.phase(Phase.ENGINE):
                group = TokenGroup(batch[0].group.prompt_ids, completions)
                measured = list(self._policy.certainties(group, batch[0].rules))
            if len(measured) != len(completions):
                raise RuntimeError(f"the policy measured {len(measured)} of {len(completions)} completions")
            self._metrics.record_cache(self._policy.cache_stats)
        except Exception as error:  # handed to every request that waits for it
            for job in batch:
                job.future.set_exception(error)
            return
        for job in batch:
            num_own = len(job.group.completions)
            job.future.set_result(measured[:num_own])
            measured = measured[num_own:]
