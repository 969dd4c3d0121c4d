"""The processes that hold a policy together: started, watched and ended by the one that serves."""

import atexit
import math
import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from torch._C._distributed_c10d import TCPStore

from shopr1_service.heartbeat import Heartbeat
from shopr1_service.startup import Startup
from shopr1_service.tensor_parallel.coordinator import Coordinator
from shopr1_service.tensor_parallel.participant import LOOPBACK, Participant

_JOIN_S = 5.0


class Ranks:
    """A thread of this process, and a process for each further device."""

    def __init__(self, num_ranks: int, timeout: timedelta, startup: Startup) -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            self.port = int(listener.getsockname()[1])
            # Left to itself, the store listens on every interface.
            store = TCPStore(
                *(LOOPBACK, self.port, num_ranks, True),
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        own, theirs = Pipe()
        self.participant = Participant(0, theirs, store=store, startup=startup)
        self._thread = threading.Thread(target=self.participant.run, name="rank-0", daemon=True)
        self._thread.start()
        connections: list[Connection] = [own]
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, num_ranks):
            connection, process = _start(rank)
            connections.append(connection)
            self.processes.append(process)
        self.coordinator = Coordinator(connections)
        atexit.register(self.close)

    @property
    def are_whole(self) -> bool:
        """Whether all processes run."""
        return all(process.poll() is None for process in self.processes)

    def close(self) -> None:
        """End all but this process. What hangs in this one is left to hang."""
        atexit.unregister(self.close)
        for process in self.processes:
            process.kill()
            process.wait()
        self.coordinator.close()
        self._thread.join(_JOIN_S)


class RanksHeartbeat(Heartbeat):
    """Of this process, until another one has ended: then there is none, also while nothing is measured."""

    def __init__(self, local: Heartbeat, ranks: Ranks) -> None:
        self._local = local
        self._ranks = ranks

    def beat(self, *_: object) -> None:
        self._local.beat()

    @property
    def age_s(self) -> float:
        return self._local.age_s if self._ranks.are_whole else math.inf


def _start(rank: int) -> tuple[Connection, subprocess.Popen[bytes]]:
    """A fresh interpreter: a fork of one that uses CUDA, or has threads, is none."""
    ours, theirs = Pipe()
    fd = theirs.fileno()
    # The same modules from the same places, whatever directory this process was started in.
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100  # "" is the current one
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "shopr1_service.tensor_parallel.worker", str(rank), str(fd)],
        stdin=subprocess.DEVNULL,
        pass_fds=[fd],
        env={**os.environ, "PYTHONPATH": path},
    )
    theirs.close()
    return ours, process
