"""A torch.distributed group of two for one transfer: rank 0 the trainer, rank 1 the service.

It is independent of the default group of either side. Gloo notices at once if the other side closes the
connection; if it is silent, the transfer ends at the deadline.

NCCL is untested. It is polled, and its own watchdog, which would end the process after a failed broadcast, is
not started: at the deadline the communicator is aborted. It is unknown whether that also frees a process that
waits in NCCL's first broadcast, where it connects.
"""

import os
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Self

from torch import Tensor, distributed
from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed does not export them

PREFIX = "group"
"""Prefix of the group's keys in the store."""

_SIZE = 2
_SLICE_S = 0.2
_GRACE_S = 0.05
_NCCL_POLL_S = 0.001
_NCCL_BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"


class GroupError(Exception):
    """The group cannot be made, or a broadcast in it has failed."""


class Deadline:
    """Common deadline of all steps of a transfer."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """Remaining time, s; 0 after the deadline."""
        return max(0.0, self._end_s - time.monotonic())

    @property
    def left(self) -> timedelta:
        """Remaining time and a little more, as a limit for torch, which takes 0 for no limit."""
        return timedelta(seconds=self.left_s + _GRACE_S)


class Group:
    """Process group of the two sides; a context manager.

    Args:
        store: the transfer's TCPStore.
        address: this machine's address, as the other side sees it; NCCL finds its own.
        deadline: of all broadcasts.
        formation: deadline for making the group.
        check: called a few times a second during a broadcast; its exception ends the wait.

    Raises:
        GroupError: no such backend, or the other side did not join.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        *,
        backend: str,
        address: str,
        deadline: Deadline,
        formation: Deadline,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        check_backend(backend)
        self._is_nccl, self._deadline, self._check = backend == "nccl", deadline, check
        try:
            # Any: torch's stubs lack the backends' methods.
            self._backend: Any = _make(PrefixStore(PREFIX, store), rank, backend, address, formation)
        except (RuntimeError, ValueError) as error:
            traceback.clear_frames(error.__traceback__)
            del store  # the error's traceback would keep the connection open
            raise GroupError(f"the other side did not join: {reason(error)}") from None
        self._work: Any = None
        self._watchdog = _watchdog(self._backend, deadline) if self._is_nccl else None

    def broadcast(self, piece: Tensor, root: int) -> None:
        """Send the piece if this is the root, else receive it; returns when that is done.

        Raises:
            GroupError: it failed, or the deadline is over.
        """
        if not self._deadline.left_s:
            raise GroupError("the deadline has passed")
        # Gloo cannot cancel a broadcast: it must time out itself.
        self._backend._set_default_timeout(self._deadline.left)
        options = distributed.BroadcastOptions()
        options.rootRank = root
        try:
            self._work = self._backend.broadcast([piece], options)
            self._finish()
        except RuntimeError as error:
            raise GroupError(reason(error)) from None

    def _finish(self) -> None:
        """Wait. No local variable may hold the work: an error's traceback would keep the connection open."""
        self._pause()
        while not self._work.is_completed():
            self._check()
            if not self._deadline.left_s:
                raise GroupError("the deadline has passed")
            self._pause()
        self._work.wait()

    def _pause(self) -> None:
        limit_s = min(_SLICE_S, self._deadline.left.total_seconds())
        (_poll if self._is_nccl else _wait)(self._work, limit_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._backend.abort()
        # Gloo closes its connection and ends its threads with its last reference.
        self._work = self._backend = None


def check_backend(backend: str) -> None:
    """
    Raises:
        GroupError: this torch lacks it.
    """
    has = {"gloo": distributed.is_gloo_available, "nccl": distributed.is_nccl_available}
    if backend not in has:
        raise GroupError(f"no backend {backend!r}: it is gloo or nccl")
    if not has[backend]():
        raise GroupError(f"this torch lacks {backend}")


def reason(error: Exception) -> str:
    """Torch's error message without file names, stack and advice."""
    line = str(error).partition("\n")[0]
    return line.rpartition("] ")[2].partition(". ")[0] if line.startswith("[/") else line


def _make(store: Store, rank: int, backend: str, address: str, formation: Deadline) -> Any:  # noqa: ANN401
    return _nccl(store, rank, formation) if backend == "nccl" else _gloo(store, rank, address, formation)


def _gloo(store: Store, rank: int, address: str, deadline: Deadline) -> Any:  # noqa: ANN401
    options: Any = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = deadline.left
    options._threads = 1  # there is one broadcast at a time
    return distributed.ProcessGroupGloo(store, rank, _SIZE, options)


def _nccl(store: Store, rank: int, deadline: Deadline) -> Any:  # noqa: ANN401
    options: Any = distributed.ProcessGroupNCCL.Options()
    options._timeout = deadline.left
    former = os.environ.get(_NCCL_BLOCKING)
    os.environ[_NCCL_BLOCKING] = "1"  # read when the group is made; no watchdog
    try:
        return distributed.ProcessGroupNCCL(store, rank, _SIZE, options)
    finally:
        if former is None:
            del os.environ[_NCCL_BLOCKING]
        else:
            os.environ[_NCCL_BLOCKING] = former


def _watchdog(backend: Any, deadline: Deadline) -> threading.Timer:  # noqa: ANN401
    """Aborts at the deadline: NCCL connects within its first broadcast, which has no time limit."""
    timer = threading.Timer(deadline.left_s, backend.abort)
    timer.daemon = True
    timer.start()
    return timer


def _wait(work: distributed.Work, limit_s: float) -> None:
    with suppress(RuntimeError):  # a time-out; or a failure, which is raised later
        work.wait(timedelta(seconds=limit_s))


def _poll(work: distributed.Work, limit_s: float) -> None:
    """Poll: a wait that times out would break NCCL's communicator."""
    end_s = time.monotonic() + limit_s
    while not work.is_completed() and time.monotonic() < end_s:
        time.sleep(_NCCL_POLL_S)
