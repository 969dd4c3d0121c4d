"""Every scored rollout as a line of JSON, for whoever wants to know what was rewarded, and why.

Scoring never waits for a disk. Lines are made and written by a thread of its own, behind a queue that is
bounded in bytes. What cannot be queued or written is dropped and counted, an outage is told once, and writing
goes on by itself when there is room again.
"""

import errno
import logging
import threading
from collections import deque
from enum import StrEnum

from shopr1_service.core import Origin, ScoredGroup
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.monitoring.rollout_record import Entry, entry
from shopr1_service.monitoring.rotating_jsonl import JsonlFiles
from shopr1_service.settings import Settings

logger = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 64 * 2**20
CLOSE_S = 5.0
"""How long the end of the service waits for the disk."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Loss(StrEnum):
    """Why a rollout is missing in the log."""

    QUEUE_FULL = "queue_full"
    """The disk is slower than scoring."""
    DISK_FULL = "disk_full"
    """No room, or a quota or a limit of the system is reached."""
    ERROR = "error"
    """Anything else; the service's log says what."""
    SHUTDOWN = "shutdown"
    """The service ended before it could be written."""


def open_rollout_log(settings: Settings, metrics: Metrics) -> "RolloutLog | None":
    """The log that the settings ask for, if they do.

    Raises:
        SettingsError: its directory cannot be made or written.
    """
    if settings.rollout_log is None:
        return None
    files = JsonlFiles(
        settings.rollout_log, max_bytes=settings.rollout_log_bytes, max_files=settings.rollout_log_files
    )
    return RolloutLog(files, metrics, with_text=settings.rollout_log_text)


class RolloutLog:
    """See the module.

    Args:
        with_text: prompts and completions are logged too.
    """

    def __init__(self, files: JsonlFiles, metrics: Metrics, *, with_text: bool = False) -> None:
        self._files = files
        self._metrics = metrics
        self._with_text = with_text
        self._former: Origin | None = None
        self._index = 0
        self._changed = threading.Condition()  # guards the three below
        self._queue: deque[Entry] = deque()
        self._num_queued_bytes = 0
        self._is_closed = False
        self._num_lost = 0  # since the outage began; of the writer's thread
        for loss in Loss:
            metrics.record_rollout_log_dropped(loss, 0)  # rates of it have a value from the start
        self._thread = threading.Thread(target=self._run, name="rollout-log", daemon=True)
        self._thread.start()

    def observe(self, scored: ScoredGroup) -> None:
        """Log a group (an `Observer`). Called from the event loop only, with a request's groups in order."""
        # Ids of requests may be equal, being the clients'; their origins are not the same.
        self._index = self._index + 1 if scored.origin is self._former else 0
        self._former = scored.origin
        new = entry(scored, self._index, with_text=self._with_text)
        if not self._put(new):
            self._metrics.record_rollout_log_dropped(Loss.QUEUE_FULL, new.num_rollouts)

    def close(self) -> None:
        """Write what is queued, as far as the disk takes it in time."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(CLOSE_S)
        with self._changed:
            num_left = sum(left.num_rollouts for left in self._queue)
            self._queue.clear()
        if num_left:
            self._metrics.record_rollout_log_dropped(Loss.SHUTDOWN, num_left)
            logger.error("the rollout log is not written within %g s: %d are lost", CLOSE_S, num_left)

    def _put(self, new: Entry) -> bool:
        with self._changed:
            if self._queue and self._num_queued_bytes + new.num_bytes > MAX_QUEUED_BYTES:
                return False
            self._queue.append(new)
            self._num_queued_bytes += new.num_bytes
            self._changed.notify()
            return True

    def _run(self) -> None:
        while (next_one := self._take()) is not None:
            try:
                self._files.append(next_one.lines())
            except OSError as error:
                self._lose(next_one, Loss.DISK_FULL if error.errno in _FULL else Loss.ERROR, str(error))
            except Exception as error:  # a rollout that cannot be written must not end the thread
                self._lose(next_one, Loss.ERROR, type(error).__name__)
            else:
                self._recover()
        self._files.close()

    def _take(self) -> Entry | None:
        """The next entry; None once the log is closed and all is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            if not self._queue:
                return None
            taken = self._queue.popleft()
            self._num_queued_bytes -= taken.num_bytes
            return taken

    def _lose(self, lost: Entry, loss: Loss, why: str) -> None:
        if self._num_lost == 0:
            logger.error("the rollout log cannot be written, rollouts are dropped: %s", why)
        self._num_lost += lost.num_rollouts
        self._metrics.record_rollout_log_dropped(loss, lost.num_rollouts)

    def _recover(self) -> None:
        if self._num_lost:
            logger.warning("the rollout log is written again; %d rollouts were dropped", self._num_lost)
            self._num_lost = 0
