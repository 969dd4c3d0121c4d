"""Weights from a trainer, through a torch.distributed group that is made for one transfer.

`shopr1_client.updates.broadcast` defines the protocol. While a piece is being used no other is on
its way: what gloo has begun cannot be taken back, and a sink that fails ends the transfer at once.
"""

import contextlib
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import torch
from torch._C._distributed_c10d import Store, TCPStore

from shopr1_client.updates.broadcast import FAILED, JOINED
from shopr1_client.updates.chunks import PIECE_BYTES, cut
from shopr1_client.updates.process_group import Deadline, Group, GroupError, check_backend, reason
from shopr1_client.wire_policy import TensorSpec, TransferRequest

_ELEMENT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_CUT_S = 0.1
_CONNECTION_S = 10.0
"""For connecting to the store, which answers whatever its trainer does."""


class TransferError(Exception):
    """The weights did not come; the message is for people."""


def receive(request: TransferRequest, device: torch.device, sink: Callable[[memoryview], None]) -> None:
    """Receive the tensors and hand their bytes over in order: little endian, row by row, without gaps.

    Blocks, `request.timeout_s` at most, and until the sink has used its last piece. Takes `PIECE_BYTES` of
    memory, with NCCL as much on the device.

    Args:
        device: where NCCL receives; gloo does on the CPU.
        sink: gets one piece after another; each is overwritten when it has returned. What it raises ends the
            transfer: the trainer gets an error at once.

    Raises:
        TransferError: the trainer is not there, has died, has given up or was too slow; or this torch comes
            without the backend.
    """
    deadline = Deadline(request.timeout_s)
    progress = _Progress(request)
    try:
        check_backend(request.backend)
        with _Connection(request, deadline) as connection:
            _receive_all(connection.group(), request, device, sink, progress)
    except GroupError as error:
        cause = str(error) if deadline.left_s else f"the {request.timeout_s:g} s are over"
        raise TransferError(f"{cause}; {progress}") from None


def num_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * _ELEMENT_BYTES[spec.dtype]


class _Progress:
    """How much has come, for people."""

    def __init__(self, request: TransferRequest) -> None:
        self._tensors = request.tensors
        self.num_tensors = 0
        self.num_bytes = 0

    def __str__(self) -> str:
        if self.num_tensors == len(self._tensors):
            return "all tensors had come"
        spec = self._tensors[self.num_tensors]
        return (
            f"{self.num_tensors} of {len(self._tensors)} tensors had come, and {self.num_bytes} of "
            f"{num_bytes(spec)} bytes of {spec.name!r}"
        )


class _Connection:
    """To the trainer. A context manager: what ends it is told to the trainer before the group is closed.

    Nobody else holds the store, or the tracebacks of errors would keep the connection open with it.
    """

    def __init__(self, request: TransferRequest, deadline: Deadline) -> None:
        self._request, self._deadline = request, deadline
        self._closing = contextlib.ExitStack()
        limit = Deadline(min(_CONNECTION_S, deadline.left_s))
        peer, self._address = _probe(request, limit)
        with _cut_at(limit, peer):
            self._store: Store | None = _store(peer, limit)
        self._closing.enter_context(_cut_at(deadline, peer))

    def group(self) -> Group:
        """
        Raises:
            GroupError: the trainer does not come.
        """
        assert self._store is not None
        sizes = [num_bytes(spec) for spec in self._request.tensors]
        try:
            self._store.set(JOINED, json.dumps(sizes))
        except RuntimeError as error:
            raise GroupError(f"the trainer is gone: {reason(error)}") from None
        group = Group(
            self._store,
            1,
            backend=self._request.backend,
            address=self._address,
            deadline=self._deadline,
            formation=self._deadline,
        )
        return self._closing.enter_context(group)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if self._store is not None and kind is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(FAILED, str(error) or kind.__name__)
        self._closing.close()
        self._store = None


def _probe(request: TransferRequest, limit: Deadline) -> tuple[tuple[str, int], str]:
    """Where the store is, and the address from which this machine reaches it.

    By itself: TCPStore tries again and again where nobody listens.
    """
    try:
        with socket.create_connection((request.host, request.port), limit.left_s) as probe:
            return probe.getpeername(), probe.getsockname()[0]
    except OSError as error:
        raise TransferError(f"no trainer at {request.host}:{request.port}: {error}") from error


def _store(peer: tuple[str, int], limit: Deadline) -> Store:
    host, port = peer[:2]
    try:
        return TCPStore(host, port, is_master=False, timeout=limit.left, wait_for_workers=False)
    except RuntimeError as error:
        raise TransferError(f"no TCPStore at {host}:{port}: {reason(error)}") from None


@contextlib.contextmanager
def _cut_at(deadline: Deadline, peer: tuple[str, int]) -> Iterator[None]:
    """End the connections to the store from the deadline on, within.

    TCPStore waits without a limit for the answer of a server that stands still, whatever its timeout is; and
    it connects anew.
    """
    is_over = threading.Event()

    def cut_until_over() -> None:
        limit_s = deadline.left_s
        while not is_over.wait(limit_s):
            _cut(peer)
            limit_s = _CUT_S

    thread = threading.Thread(target=cut_until_over, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _cut(peer: tuple[str, int]) -> None:
    """The port is of one transfer alone: no other connection of this process leads there."""
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            # `fromfd` leaves its copy open if that is no socket.
            if path.is_socket():
                with socket.fromfd(int(path.name), socket.AF_INET6, socket.SOCK_STREAM) as each:
                    if _is_at(each.getpeername(), peer):
                        each.shutdown(socket.SHUT_RDWR)


def _is_at(name: object, peer: tuple[str, int]) -> bool:
    """Unix sockets have no tuple; torch's have IPv4 addresses within IPv6."""
    return isinstance(name, tuple) and (str(name[0]).removeprefix("::ffff:"), name[1]) == peer[:2]


def _receive_all(
    group: Group,
    request: TransferRequest,
    device: torch.device,
    sink: Callable[[memoryview], None],
    progress: _Progress,
) -> None:
    host = bytearray(PIECE_BYTES)
    on_host = torch.frombuffer(host, dtype=torch.uint8)
    buffer = (
        torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device) if request.backend == "nccl" else on_host
    )
    for spec in request.tensors:
        progress.num_bytes = 0
        for first, end in cut(num_bytes(spec), 1):
            piece = end - first
            group.broadcast(buffer[:piece], 0)
            if buffer is not on_host:
                on_host[:piece].copy_(buffer[:piece])
            sink(memoryview(host)[:piece])
            progress.num_bytes = end
        progress.num_tensors += 1
    group.broadcast(torch.zeros(1, dtype=torch.uint8, device=buffer.device), 1)
