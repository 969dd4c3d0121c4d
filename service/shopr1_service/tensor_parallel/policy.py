"""The policy as the service sees it when it is split over several devices."""

import atexit
import contextlib
import logging
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import torch
from torch._C._distributed_c10d import TCPStore

from shopr1_client.wire import PolicyInfo
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.codec import PolicyCodec
from shopr1_service.engine import Certainty, EngineStats, FatalEngineError, TokenGroup, Unmeasurable
from shopr1_service.errors import PolicyError
from shopr1_service.heartbeat import Heartbeat
from shopr1_service.loaded_policy import LoadedPolicy
from shopr1_service.settings import Settings
from shopr1_service.source import Source
from shopr1_service.startup import Startup
from shopr1_service.tensor_parallel.coordinator import Coordinator
from shopr1_service.tensor_parallel.messages import Load, Measure
from shopr1_service.tensor_parallel.participant import LOOPBACK, Participant
from shopr1_service.tensor_parallel.plan import plan_overrides
from shopr1_service.versions import Version, VersionTable

logger = logging.getLogger(__name__)

_JOIN_S = 5.0
_PRIVATE = {"api_keys", "api_key_file"}
"""Settings that a process which does not serve has no business with."""


class Ranks:
    """The processes that hold a policy together: a thread of this one, and one for each further device."""

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


class TensorParallelPolicy:
    """A policy that measures on several devices, and does not change while it serves.

    Args:
        local: this process's part.
    """

    def __init__(self, local: LoadedPolicy, ranks: Ranks, device: str) -> None:
        self.codec: PolicyCodec = local.codec
        self.versions: VersionTable = local.versions
        self.heartbeat: Heartbeat = _Heartbeat(local.heartbeat, ranks)
        self.info: PolicyInfo = local.info.model_copy(update={"device": device})
        self._local = local
        self._ranks = ranks

    @property
    def stats(self) -> EngineStats:
        return self._local.stats

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> Sequence[Sequence[Certainty | Unmeasurable]]:
        try:
            measured, *_ = self._ranks.coordinator.run(Measure(groups, rules))
        except FatalEngineError:
            self.close()
            raise
        return measured  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the processes of the other devices. Nothing can be measured from then on."""
        self._ranks.close()


class _Heartbeat(Heartbeat):
    """Of this process, until another one has ended: then there is none, also while nothing is measured."""

    def __init__(self, local: Heartbeat, ranks: Ranks) -> None:
        self._local = local
        self._ranks = ranks

    def beat(self, *_: object) -> None:
        self._local.beat()

    @property
    def age_s(self) -> float:
        return self._local.age_s if self._ranks.are_whole else math.inf


def load_on_all_ranks(source: Source, settings: Settings, startup: Startup) -> TensorParallelPolicy:
    """Start the processes, and load the policy in all of them.

    Raises:
        PolicyError: it cannot be split, or not loaded.
        FatalEngineError: a process has ended.
    """
    overrides = plan_overrides(source, settings)
    num_ranks = settings.tensor_parallel
    ranks = Ranks(num_ranks, timedelta(seconds=settings.engine_timeout_s), startup)
    with contextlib.ExitStack() as on_error:
        on_error.callback(ranks.close)
        num_threads = max(1, torch.get_num_threads() // num_ranks)
        dumped = settings.model_dump(exclude=_PRIVATE)
        infos = ranks.coordinator.run(Load(num_ranks, ranks.port, source, dumped, overrides, num_threads))
        if any(info != infos[0] for info in infos):
            raise PolicyError(f"the devices do not agree on what they have loaded: {infos}")
        assert ranks.participant.policy is not None
        on_error.pop_all()
    logger.info("%s is split over %d devices", source.name, num_ranks)
    return TensorParallelPolicy(ranks.participant.policy, ranks, f"{infos[0].device} × {num_ranks}")


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
