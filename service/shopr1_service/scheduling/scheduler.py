"""The engine's thread, and who may wait for it.

A request is admitted as a whole or refused: what waits is bounded in tokens, and a refusal says when to come
back, from the rate at which tokens were measured recently. What is admitted waits in a `RequestQueue`; a
cancelled call takes its work out of it. An idle engine begins at once.

Between two batches the thread does errands: what must not happen while a batch is being measured, as a change
of the policy's weights.

The thread survives whatever a policy raises, but for a `FatalEngineError`: then the device is gone, nothing
more is admitted, and the process should end.

Something that the engine's thread does between two batches.

How fast the engine has been of late.
"""

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from shopr1_client.errors import NotReadyError, OverloadedError, ProblemError
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import (
    Certainty,
    FatalEngineError,
    Kind,
    Measurements,
    Progress,
    TokenGroup,
    Unmeasurable,
    Version,
)
from shopr1_service.engine.heartbeat import IDLE_BEAT_S
from shopr1_service.errors import RETRY_AFTER_S
from shopr1_service.monitoring.metrics import Metrics, Phase
from shopr1_service.monitoring.spans import EnginePass, record_passes
from shopr1_service.policy.base import Policy
from shopr1_service.scheduling.request_queue import (
    Batch,
    Job,
    RequestQueue,
    begins,
    deal,
    fail,
    joined,
    num_tokens,
)

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Scheduler:
    """Measures groups on a thread of its own.

    Args:
        max_queue_tokens: how much may wait. What is larger is admitted when nothing else waits.
        is_deterministic: measure each group alone, so that no other request has an influence on its numbers.
        on_fatal: called, on the engine's thread, when the device is gone.
    """

    def __init__(
        self,
        policy: Policy,
        metrics: Metrics,
        *,
        max_queue_tokens: int,
        is_deterministic: bool = False,
        on_fatal: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._policy = policy
        self._metrics = metrics
        self._max_queue_tokens = max_queue_tokens
        self._on_fatal = on_fatal
        self._rate = TokenRate()
        self._backlog = RequestQueue(joins=not is_deterministic)
        self._errands: deque[EngineTask[Any]] = deque()
        self._changed = threading.Condition()  # guards the two above and the two below
        self._is_closed = False
        self._is_broken = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def compute_certainties(
        self, groups: Sequence[TokenGroup], kind: Kind, progress: Progress | None = None
    ) -> list[Measurements]:
        """As `EngineClient` says. All groups are admitted, or none."""
        now_s = time.perf_counter()
        progress = progress or Progress()
        jobs = [self._job(group, kind, now_s, progress) for group in groups]
        self._admit([job for job in jobs if job.group.completions], progress)
        try:
            return list(await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs)))
        finally:
            self._drop(jobs)
            record_passes((job.visit for job in jobs if job.group.completions), now_s)

    async def between_batches(self, work: Callable[[], _Result]) -> _Result:
        """What `work` returns, or raises, when it is called on the engine's thread, before the next batch.

        Raises:
            NotReadyError: the device is gone, or the service is shutting down.
        """
        errand = EngineTask(work)
        with self._changed:
            self._refuse_if_ended()
            self._errands.append(errand)
            self._changed.notify()
        return await asyncio.wrap_future(errand.future)

    @property
    def num_waiting_tokens(self) -> int:
        return self._backlog.num_tokens

    def refuse_if_full(self) -> None:
        """Raise `OverloadedError` if there is no room for anything: before work is put into a request."""
        with self._changed:
            if self._backlog.num_tokens >= self._max_queue_tokens:
                raise self._overloaded(1)

    def stack(self) -> str:
        """Where the engine's thread is."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame else "it has ended"

    def close(self) -> None:
        """End the thread after what it is doing; what waits is cancelled."""
        with self._changed:
            self._is_closed = True
            waiting = list(self._backlog)
            self._changed.notify()
        self._drop(waiting)

    def _job(self, group: TokenGroup, kind: Kind, now_s: float, progress: Progress) -> Job:
        job = Job(TokenGroup(tuple(group.prompt_ids), group.completions), kind, now_s, now_s, progress)
        job.rank_s += self._rate.seconds(job.num_prompt_tokens + job.num_own_tokens)
        if not group.completions:
            job.future.set_result(Measurements([], self._policy.versions.find(kind.target)))
        return job

    def _admit(self, jobs: Sequence[Job], progress: Progress) -> None:
        with self._changed:
            self._refuse_if_ended()
            num_tokens = self._backlog.num_added_tokens(jobs)
            if self._backlog and self._backlog.num_tokens + num_tokens > self._max_queue_tokens:
                raise self._overloaded(num_tokens)
            progress.num_waiting = len(jobs)  # from here on the engine's thread counts it down
            self._backlog.add(jobs)
            self._record_queue()
            self._changed.notify()

    def _refuse_if_ended(self) -> None:
        if self._is_broken:
            raise NotReadyError("the engine has failed, the service is ending", retry_after_s=RETRY_AFTER_S)
        if self._is_closed:
            raise NotReadyError("the service is shutting down", retry_after_s=RETRY_AFTER_S)

    def _overloaded(self, num_tokens: int) -> OverloadedError:
        self._metrics.record_rejection("queue_full")
        excess = self._backlog.num_tokens + num_tokens - self._max_queue_tokens
        return OverloadedError(
            f"{self._backlog.num_tokens} tokens wait, max_queue_tokens = {self._max_queue_tokens}",
            retry_after_s=max(1.0, self._rate.seconds(excess)),
        )

    def _drop(self, jobs: Sequence[Job]) -> None:
        """Cancel what is not running and not done, and make room for others."""
        for job in jobs:
            job.future.cancel()
        with self._changed:
            for job in jobs:
                self._backlog.discard(job)
            self._record_queue()

    def _record_queue(self) -> None:
        self._metrics.record_queue(self._backlog.num_tokens)

    def _run(self) -> None:
        while (work := self._take()) is not None:
            try:
                if isinstance(work, EngineTask):
                    work.run()
                else:
                    self._measure(work)
            except FatalEngineError as error:
                self._give_up(error)
                return

    def _take(self) -> "EngineTask[Any] | Batch | None":
        """What is to be done next; nothing once the scheduler is closed."""
        with self._changed:
            while not (self._errands or self._backlog or self._is_closed):
                self._policy.heartbeat.beat()
                self._changed.wait(IDLE_BEAT_S)
            if self._is_closed:
                dismiss(self._errands, "the service is shutting down")
                return None
            if self._errands:
                return self._errands.popleft()
            batch = self._backlog.take()
            self._record_queue()
            return batch

    def _measure(self, batch: Batch) -> None:
        lanes = [[job for job in lane if begins(job)] for lane in batch]
        lanes = [lane for lane in lanes if lane]
        if not lanes:
            return
        self._policy.heartbeat.beat()
        kind = lanes[0][0].kind
        try:
            version = self._policy.versions.find(kind.target)
        except ProblemError as error:  # it was there when the request came
            fail(lanes, error)
            return
        self._measure_with(version, lanes)

    def _measure_with(self, version: Version, lanes: Batch) -> None:
        groups = [joined(lane) for lane in lanes]
        visit = EnginePass(len(groups), sum(map(num_tokens, groups)))
        for lane in lanes:
            for job in lane:
                job.visit = visit
                self._metrics.record_phase(Phase.QUEUE, visit.start_s - job.submitted_s)
        try:
            measured = self._certainties(groups, lanes[0][0].kind.rules, version)
        except FatalEngineError:
            fail(lanes, NotReadyError("the engine has failed", retry_after_s=RETRY_AFTER_S))
            raise
        except Exception as error:  # handed over to every request that waits for it
            fail(lanes, error)
            return
        self._rate.record(visit.num_tokens, visit.end())
        for lane, certainties in zip(lanes, measured, strict=True):
            deal(lane, certainties, version)

    def _certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version
    ) -> Sequence[Sequence[Certainty | Unmeasurable]]:
        with self._metrics.phase(Phase.ENGINE):
            measured = self._policy.certainties(groups, rules, version)
        expected = [len(group.completions) for group in groups]
        if (counts := list(map(len, measured))) != expected:
            raise RuntimeError(f"the policy measured {counts} of {expected} completions")
        self._metrics.record_batch(len(groups), sum(map(num_tokens, groups)))
        self._metrics.record_engine(self._policy.stats)
        return measured

    def _give_up(self, error: FatalEngineError) -> None:
        logger.critical("the device is gone, nothing more can be scored", exc_info=error)
        with self._changed:
            self._is_broken = True
            waiting = list(self._backlog)
            dismiss(self._errands, "the engine has failed")
        # From here on nobody but this thread settles them: cancelled ones are skipped.
        fail(
            [[job for job in waiting if job.future.set_running_or_notify_cancel()]],
            NotReadyError("the engine has failed", retry_after_s=RETRY_AFTER_S),
        )
        self._on_fatal(error)


Result = TypeVar("Result")


class EngineTask(Generic[Result]):
    """A piece of work, and a future for what comes of it.

    Nobody can call it off: whoever asked for it may have gone, but what it changes should be changed.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self.future: Future[Result] = Future()
        self.future.set_running_or_notify_cancel()
        self._work = work

    def run(self) -> None:
        """Do it.

        Raises:
            FatalEngineError: the device is gone, or in a state that nothing can be measured in.
        """
        try:
            result = self._work()
        except FatalEngineError:
            self.dismiss("the engine has failed")
            raise
        except BaseException as error:  # handed over, whatever it is
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def dismiss(self, why: str) -> None:
        """It will not be done."""
        self.future.set_exception(NotReadyError(why, retry_after_s=RETRY_AFTER_S))


def dismiss(errands: deque[EngineTask[Any]], why: str) -> None:
    """None of these will be done."""
    while errands:
        errands.popleft().dismiss(why)


_MEMORY = 0.9


class TokenRate:
    """Tokens per second of late: the mean over batches, each weighing 0.9 of the one after it."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0

    def record(self, num_tokens: int, duration_s: float) -> None:
        self._num_tokens = self._num_tokens * _MEMORY + num_tokens
        self._seconds = self._seconds * _MEMORY + duration_s

    def seconds(self, num_tokens: int) -> float:
        """How long so many tokens will take; 0 as long as nothing is known."""
        return num_tokens * self._seconds / self._num_tokens if self._num_tokens else 0.0
