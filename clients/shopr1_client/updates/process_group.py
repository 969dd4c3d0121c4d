"""A torch.distributed group of two for one transfer: rank 0 the trainer, rank 1 the service.

It stands beside a default group that either has, and neither knows of the other. Gloo sees at once from the
connection that the other side is gone; one that is alive and silent is left at the deadline.

NCCL takes the same way and is untested. Its waits are polls, and its own watchdog, which would end the
process where a broadcast failed, is not started: at the deadline the communicator is aborted. Whether that
also frees a process that waits in NCCL's first broadcast, where it connects, is not known.
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
"""Of the group's keys in the store."""

_SIZE = 2
_SLICE_S = 0.2
_GRACE_S = 0.05
_NCCL_POLL_S = 0.001
_NCCL_BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"


class GroupError(Exception):
    """There is no group, or a broadcast in it has failed."""


class Deadline:
    """One end for all steps of a transfer."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """0 if it is over."""
        return max(0.0, self._end_s - time.monotonic())

    @property
    def left(self) -> timedelta:
        """A little more, for torch: its own limits come second. It takes 0 for no limit at all."""
        return timedelta(seconds=self.left_s + _GRACE_S)


class Group:
    """See the module. A context manager: nothing of it stays.

    Args:
        store: the transfer's TCPStore.
        address: of this machine, where the other side reaches it; NCCL finds its own.
        deadline: for everything that is done with it.
        formation: for making it.
        check: called a few times a second while a broadcast is waited for; what it raises ends the wait.

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
            del store  # the error would keep the connection open with it
            raise GroupError(f"the other side did not join: {reason(error)}") from None
        self._work: Any = None
        self._watchdog = _watchdog(self._backend, deadline) if self._is_nccl else None

    def broadcast(self, piece: Tensor, root: int) -> None:
        """Send the piece if this is the root, else fill it; returns when that is done.

        Raises:
            GroupError: it failed, or the deadline is over.
        """
        if not self._deadline.left_s:
            raise GroupError("the time is over")
        # What gloo has begun cannot be stopped: it must end at the deadline by itself.
        self._backend._set_default_timeout(self._deadline.left)
        options = distributed.BroadcastOptions()
        options.rootRank = root
        try:
            self._work = self._backend.broadcast([piece], options)
            self._finish()
        except RuntimeError as error:
            raise GroupError(reason(error)) from None

    def _finish(self) -> None:
        """No local variable has the work: an error's traceback would keep the connection open with it."""
        self._pause()
        while not self._work.is_completed():
            self._check()
            if not self._deadline.left_s:
                raise GroupError("the time is over")
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
        # Gloo closes its connection and ends its threads when the last reference goes.
        self._work = self._backend = None


def check_backend(backend: str) -> None:
    """
    Raises:
        GroupError: this torch does not have it.
    """
    has = {"gloo": distributed.is_gloo_available, "nccl": distributed.is_nccl_available}
    if backend not in has:
        raise GroupError(f"no backend {backend!r}: it is gloo or nccl")
    if not has[backend]():
        raise GroupError(f"this torch comes without {backend}")


def reason(error: Exception) -> str:
    """What torch says, without its file names, stack and advice."""
    line = str(error).partition("\n")[0]
    return line.rpartition("] ")[2].partition(". ")[0] if line.startswith("[/") else line


def _make(store: Store, rank: int, backend: str, address: str, formation: Deadline) -> Any:  # noqa: ANN401
    return _nccl(store, rank, formation) if backend == "nccl" else _gloo(store, rank, address, formation)


def _gloo(store: Store, rank: int, address: str, deadline: Deadline) -> Any:  # noqa: ANN401
    options: Any = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = deadline.left
    options._threads = 1  # one piece after another
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
    """NCCL connects within its first broadcast, which has no end of its own."""
    timer = threading.Timer(deadline.left_s, backend.abort)
    timer.daemon = True
    timer.start()
    return timer


def _wait(work: distributed.Work, limit_s: float) -> None:
    with suppress(RuntimeError):  # not yet; or it has failed, which is asked for later
        work.wait(timedelta(seconds=limit_s))


def _poll(work: distributed.Work, limit_s: float) -> None:
    """NCCL breaks the communicator when a wait with a limit is over."""
    end_s = time.monotonic() + limit_s
    while not work.is_completed() and time.monotonic() < end_s:
        time.sleep(_NCCL_POLL_S)
