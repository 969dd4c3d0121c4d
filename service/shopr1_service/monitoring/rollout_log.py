"""The rollout log: a line of JSON for each scored rollout, with its reward and the reasons for it.

Scoring never waits for a disk. A thread of its own encodes and writes the lines, behind a queue that is
bounded in bytes. Rollouts that cannot be queued or written are dropped and counted. An outage is logged once,
and writing resumes when there is room again.

`logging.handlers.QueueHandler` and `QueueListener` are not suitable: their queue is bounded in records, not
in bytes, the listener's `stop` waits for the disk without a limit, and a failing handler prints to standard
error instead of counting the record. `rotating_jsonl.py` explains why `RotatingFileHandler` is not either.
"""

import errno
import logging
import threading
from collections import deque
from enum import StrEnum

from shopr1_service.core import ScoredGroup
from shopr1_service.memory.budget import Account
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.monitoring.rollout_record import Entry, make_entry
from shopr1_service.monitoring.rotating_jsonl import RotatingJsonl
from shopr1_service.settings import Settings

logger = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 64 * 2**20
CLOSE_S = 5.0
"""How long a shutdown waits for the disk."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Loss(StrEnum):
    """Reason why a rollout is missing from the log."""

    QUEUE_FULL = "queue_full"
    """The disk is slower than scoring."""
    DISK_FULL = "disk_full"
    """No room, or a quota or a system limit is reached."""
    ERROR = "error"
    """Any other error, which is in the service's log."""
    SHUTDOWN = "shutdown"
    """The service ended before the rollout was written."""


def open_rollout_log(settings: Settings, metrics: Metrics) -> "RolloutLog | None":
    """Open the log that the settings configure, if any.

    Raises:
        SettingsError: its directory cannot be created or written.
    """
    if settings.rollout_log is None:
        return None
    files = RotatingJsonl(
        settings.rollout_log, max_bytes=settings.rollout_log_bytes, max_files=settings.rollout_log_files
    )
    return RolloutLog(files, metrics, with_text=settings.rollout_log_text)


class RolloutLog:
    """Queue and writer thread of the rollout log.

    Args:
        with_text: log prompts and completions too.
    """

    def __init__(self, files: RotatingJsonl, metrics: Metrics, *, with_text: bool = False) -> None:
        self._files = files
        self._metrics = metrics
        self._with_text = with_text
        self._changed = threading.Condition()  # guards the next three
        self._queue: deque[Entry] = deque()
        self._memory = metrics.memory.hold(Account.ROLLOUT_LOG)
        self._is_closed = False
        self._num_dropped = 0  # in this outage; used by the writer's thread only
        for loss in Loss:
            metrics.record_rollout_log_dropped(loss, 0)  # so that rates have a value from the start
        self._thread = threading.Thread(target=self._run, name="rollout-log", daemon=True)
        self._thread.start()

    def observe(self, scored: ScoredGroup) -> None:
        """Log a group (an `Observer`)."""
        new = make_entry(scored, with_text=self._with_text)
        if not self._put(new):
            self._metrics.record_rollout_log_dropped(Loss.QUEUE_FULL, new.num_rollouts)

    def close(self) -> None:
        """Write the queue, for at most `CLOSE_S` seconds."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(CLOSE_S)
        with self._changed:
            num_left = sum(left.num_rollouts for left in self._queue)
            self._queue.clear()
            self._memory.resize(0)
        if num_left:
            self._metrics.record_rollout_log_dropped(Loss.SHUTDOWN, num_left)
            logger.error(
                "the rollout log was not written within %g s: %d rollouts dropped", CLOSE_S, num_left
            )

    def _put(self, new: Entry) -> bool:
        with self._changed:
            if self._queue and self._memory.num_bytes + new.num_bytes > MAX_QUEUED_BYTES:
                return False
            self._queue.append(new)
            self._memory.grow(new.num_bytes)
            self._changed.notify()
            return True

    def _run(self) -> None:
        while (entry := self._take()) is not None:
            try:
                self._files.append(entry.lines())
            except OSError as error:
                self._drop(entry, Loss.DISK_FULL if error.errno in _FULL else Loss.ERROR, str(error))
            except Exception as error:  # a rollout that cannot be written must not end the thread
                self._drop(entry, Loss.ERROR, type(error).__name__)
            else:
                self._recover()
        self._files.close()

    def _take(self) -> Entry | None:
        """The next entry; None once the log is closed and the queue is empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            if not self._queue:
                return None
            taken = self._queue.popleft()
            self._memory.grow(-taken.num_bytes)
            return taken

    def _drop(self, entry: Entry, loss: Loss, reason: str) -> None:
        if self._num_dropped == 0:
            logger.error("the rollout log cannot be written, rollouts are dropped: %s", reason)
        self._num_dropped += entry.num_rollouts
        self._metrics.record_rollout_log_dropped(loss, entry.num_rollouts)

    def _recover(self) -> None:
        if self._num_dropped:
            logger.warning("the rollout log is written again; %d rollouts were dropped", self._num_dropped)
            self._num_dropped = 0
