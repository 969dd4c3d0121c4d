"""The engine's thread, and the queue in front of it.

All groups of a call are queued or none: the queue has a capacity in tokens, and a refusal says when to retry,
from the recent token rate. A cancelled call takes its groups out of the queue. An idle engine starts at once.

Between two batches the thread runs tasks that must not overlap with a batch, such as a change of weights.

The thread survives every error of the policy but a `FatalEngineError`: then the device is unusable, nothing
more is queued, and the process should end.
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
from shopr1_service.core import (
    BatchKey,
    Certainty,
    FatalEngineError,
    GroupCertainties,
    Progress,
    Target,
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
    QueuedGroup,
    RequestQueue,
    distribute,
    merge,
    reject,
)

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_DECAY = 0.9
_FAILED = "the engine has failed"
_SHUTTING_DOWN = "the service is shutting down"


class Scheduler:
    """Computes the self-certainties of queued groups on a thread of its own.

    Args:
        max_queue_tokens: capacity of the queue. A larger call is queued when the queue is empty.
        is_deterministic: compute each group alone, so that no other request has an influence on its numbers.
        on_fatal: called on the engine's thread when the device is unusable.
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
        self._queue = RequestQueue(merges=not is_deterministic)
        self._tasks: deque[EngineTask[Any]] = deque()
        self._changed = threading.Condition()  # guards the two above and the two below
        self._is_closed = False
        self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def compute_certainties(
        self, groups: Sequence[TokenGroup], key: BatchKey, progress: Progress | None = None
    ) -> list[GroupCertainties]:
        """Compute the self-certainties of all groups, as described in `EngineClient`."""
        progress = progress or Progress()
        if not any(group.completions for group in groups):
            return self._without_tokens(groups, key, progress)
        now_s = time.perf_counter()
        queued = [self._queued(group, key, now_s, progress) for group in groups]
        nonempty = [each for each in queued if each.group.completions]
        self._enqueue(nonempty, progress)
        try:
            return list(await asyncio.gather(*(asyncio.wrap_future(each.future) for each in queued)))
        finally:
            self._drop(queued)
            record_passes((each.engine_pass for each in nonempty), now_s)

    def _without_tokens(
        self, groups: Sequence[TokenGroup], key: BatchKey, progress: Progress
    ) -> list[GroupCertainties]:
        """Results where there is nothing to measure, as with rules alone: at once, without the queue."""
        with self._changed:
            self._refuse_if_ended()
        progress.num_waiting = 0
        return [GroupCertainties([], self._policy.versions.find(key.target)) for _ in groups]

    async def between_batches(self, work: Callable[[], _Result]) -> _Result:
        """Call `work` on the engine's thread, before the next batch; return its result or raise its error.

        Raises:
            NotReadyError: the device is unusable, or the service is shutting down.
        """
        task = EngineTask(work)
        with self._changed:
            self._refuse_if_ended()
            self._tasks.append(task)
            self._changed.notify()
        return await asyncio.wrap_future(task.future)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens in the queue."""
        return self._queue.num_tokens

    def refuse_if_full(self) -> None:
        """Raise `OverloadedError` if the queue is full, before a request is prepared."""
        with self._changed:
            if self._queue.num_tokens >= self._max_queue_tokens:
                raise self._overloaded(1)

    def stack(self) -> str:
        """Stack of the engine's thread."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame else "the thread has ended"

    def close(self) -> None:
        """End the thread after its current batch; queued groups are cancelled."""
        with self._changed:
            self._is_closed = True
            queued = list(self._queue)
            self._changed.notify()
        self._drop(queued)

    def _queued(self, group: TokenGroup, key: BatchKey, now_s: float, progress: Progress) -> QueuedGroup:
        due_s = now_s + self._rate.seconds(group.num_tokens)
        queued = QueuedGroup(group.with_weights(key.target), key.rules, now_s, due_s, progress)
        if not group.completions:
            queued.future.set_result(GroupCertainties([], self._policy.versions.find(key.target)))
        return queued

    def _enqueue(self, groups: Sequence[QueuedGroup], progress: Progress) -> None:
        with self._changed:
            self._refuse_if_ended()
            num_tokens = self._queue.num_added_tokens(groups)
            if self._queue and self._queue.num_tokens + num_tokens > self._max_queue_tokens:
                raise self._overloaded(num_tokens)
            progress.num_waiting = len(groups)  # from here on the engine's thread counts down
            self._queue.add(groups)
            self._record_queue()
            self._changed.notify()

    def _refuse_if_ended(self) -> None:
        if self._has_failed:
            raise NotReadyError(f"{_FAILED}, the service is ending", retry_after_s=RETRY_AFTER_S)
        if self._is_closed:
            raise NotReadyError(_SHUTTING_DOWN, retry_after_s=RETRY_AFTER_S)

    def _overloaded(self, num_tokens: int) -> OverloadedError:
        self._metrics.record_rejection("queue_full")
        excess = self._queue.num_tokens + num_tokens - self._max_queue_tokens
        return OverloadedError(
            f"{self._queue.num_tokens} tokens wait, max_queue_tokens = {self._max_queue_tokens}",
            retry_after_s=max(1.0, self._rate.seconds(excess)),
        )

    def _drop(self, groups: Sequence[QueuedGroup]) -> None:
        """Cancel groups that are neither running nor done, and remove them from the queue."""
        for each in groups:
            each.future.cancel()
        with self._changed:
            self._queue.discard(groups)
            self._record_queue()

    def _record_queue(self) -> None:
        self._metrics.record_queue(self._queue.num_tokens)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                if isinstance(work, EngineTask):
                    work.run()
                else:
                    self._compute(work)
            except FatalEngineError as error:
                self._fail(error)
                return

    def _next(self) -> "EngineTask[Any] | Batch | None":
        """Wait for the next task or batch; None once the scheduler is closed."""
        with self._changed:
            while not (self._tasks or self._queue or self._is_closed):
                self._policy.heartbeat.beat()
                self._changed.wait(IDLE_BEAT_S)
            if self._is_closed:
                self._reject_tasks(_SHUTTING_DOWN)
                return None
            if self._tasks:
                return self._tasks.popleft()
            batch = self._queue.take()
            self._record_queue()
            return batch

    def _compute(self, batch: Batch) -> None:
        started = [[each for each in prompt_batch if each.start()] for prompt_batch in batch]
        batch = [prompt_batch for prompt_batch in started if prompt_batch]
        if not batch:
            return
        self._policy.heartbeat.beat()
        target = batch[0][0].group.prompt.scope.weights
        assert isinstance(target, Target)
        try:
            version = self._policy.versions.find(target)
        except ProblemError as error:  # it was loaded when the request came
            reject(batch, error)
            return
        self._compute_with(version, batch)

    def _compute_with(self, version: Version, batch: Batch) -> None:
        groups = [merge(prompt_batch) for prompt_batch in batch]
        engine_pass = EnginePass(len(groups), sum(group.num_tokens for group in groups))
        for each in (each for prompt_batch in batch for each in prompt_batch):
            each.engine_pass = engine_pass
            self._metrics.record_phase(Phase.QUEUE, engine_pass.start_s - each.submitted_s)
        try:
            computed = self._certainties(groups, batch[0][0], version, engine_pass)
        except FatalEngineError:
            reject(batch, NotReadyError(_FAILED, retry_after_s=RETRY_AFTER_S))
            raise
        except Exception as error:  # each request of the batch gets it
            reject(batch, error)
            return
        self._rate.record(engine_pass.num_tokens, engine_pass.end())
        for prompt_batch, certainties in zip(batch, computed, strict=True):
            distribute(prompt_batch, certainties, version)

    def _certainties(
        self, groups: Sequence[TokenGroup], first: QueuedGroup, version: Version, engine_pass: EnginePass
    ) -> Sequence[Sequence[Certainty | Unmeasurable]]:
        with self._metrics.phase(Phase.ENGINE):
            computed = self._policy.certainties(groups, first.rules, version)
        expected = [len(group.completions) for group in groups]
        if (counts := list(map(len, computed))) != expected:
            raise RuntimeError(f"the policy measured {counts} of {expected} completions")
        self._metrics.record_batch(engine_pass.num_groups, engine_pass.num_tokens)
        self._metrics.record_engine(self._policy.stats)
        return computed

    def _fail(self, error: FatalEngineError) -> None:
        logger.critical("the device is unusable, nothing more can be scored", exc_info=error)
        with self._changed:
            self._has_failed = True
            queued = list(self._queue)
            self._reject_tasks(_FAILED)
        # From here on only this thread sets results; cancelled groups are skipped.
        reject(
            [[each for each in queued if each.future.set_running_or_notify_cancel()]],
            NotReadyError(_FAILED, retry_after_s=RETRY_AFTER_S),
        )
        self._on_fatal(error)

    def _reject_tasks(self, reason: str) -> None:
        while self._tasks:
            self._tasks.popleft().reject(reason)


class EngineTask(Generic[_Result]):
    """Work for the engine's thread, and the future of its result.

    It cannot be cancelled: if its caller is cancelled, its changes must still be made.
    """

    def __init__(self, work: Callable[[], _Result]) -> None:
        self.future: Future[_Result] = Future()
        self.future.set_running_or_notify_cancel()
        self._work = work

    def run(self) -> None:
        """Do the work.

        Raises:
            FatalEngineError: the device is unusable, or in a state in which nothing can be computed.
        """
        try:
            result = self._work()
        except FatalEngineError:
            self.reject(_FAILED)
            raise
        except BaseException as error:  # the caller gets it
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def reject(self, reason: str) -> None:
        """Fail the task without doing its work."""
        self.future.set_exception(NotReadyError(reason, retry_after_s=RETRY_AFTER_S))


class TokenRate:
    """Recent seconds per token: the mean over batches, each with 0.9 of the weight of the one after it."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0

    def record(self, num_tokens: int, duration_s: float) -> None:
        self._num_tokens = self._num_tokens * _DECAY + num_tokens
        self._seconds = self._seconds * _DECAY + duration_s

    def seconds(self, num_tokens: int) -> float:
        """Expected time for so many tokens; 0 before the first batch."""
        return num_tokens * self._seconds / self._num_tokens if self._num_tokens else 0.0
