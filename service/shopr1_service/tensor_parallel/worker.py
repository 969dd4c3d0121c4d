"""The process of a rank that does not serve: `python -m shopr1_service.tensor_parallel.worker RANK FD`.

FD is its end of a pipe to the process that serves. When the other end is closed, which the kernel does when
that process dies of anything, this one ends at once, wherever it is.
"""

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shopr1_service.settings import Settings


class _Inbox:
    """What comes from the coordinator, read by a thread of its own: it must see the end at any time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def recv(self) -> Any:  # noqa: ANN401
        return pickle.loads(self._frames.get())

    def send(self, message: Any, /) -> None:  # noqa: ANN401
        self._connection.send(message)

    def _read(self) -> None:
        try:
            while True:
                self._frames.put(self._connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # the other threads may wait for a device, which nothing else interrupts


def main(rank: int, fd: int) -> None:
    """Take part until the coordinator is gone."""
    for name in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # sent to all at once; the one that serves says when it is over
        signal.signal(name, signal.SIG_IGN)
    inbox = _Inbox(Connection(fd))
    from shopr1_service.logs import logging_to_stderr
    from shopr1_service.tensor_parallel.participant import Participant  # imports torch: takes seconds

    with contextlib.ExitStack() as logging:

        def prepare(settings: "Settings") -> None:
            # What all ranks do, rank 0 tells.
            quiet = settings.model_copy(update={"log_level": "warning"})
            logging.enter_context(logging_to_stderr(quiet))

        Participant(rank, inbox, prepare=prepare).run()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
