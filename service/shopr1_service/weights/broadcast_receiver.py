"""Receiver of a trainer's weights, in a torch.distributed group that exists for one transfer.

`shopr1_client.updates.broadcast` defines the protocol. The next piece is received only after the sink has
used the last one: gloo cannot cancel a broadcast, and a sink that fails ends the transfer at once.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch._C._distributed_c10d import Store, TCPStore

from shopr1_client.updates.broadcast import FAILED, JOINED, PIECE_BYTES, cut
from shopr1_client.updates.process_group import Deadline, Group, GroupError, check_backend, reason
from shopr1_client.wire_policy import TransferRequest
from shopr1_service.weights.safetensors_header import HeaderError, TensorEntry, lay_out

_CUT_S = 0.1
_CONNECTION_S = 10.0
"""Time limit for connecting to the store, which answers whatever its trainer does."""


class TransferError(Exception):
    """The weights did not arrive; the message is the reason."""


def receive(request: TransferRequest, device: torch.device, sink: Callable[[memoryview], None]) -> None:
    """Receive the tensors' bytes in order: little endian, row-major, without gaps.

    Blocks until the sink has used the last piece, `request.timeout_s` at most. Uses `PIECE_BYTES` of memory,
    and with NCCL as much on the device.

    Args:
        device: where NCCL receives; gloo receives on the CPU.
        sink: gets the pieces; each is overwritten after it returns. Its exception ends the transfer, and the
            trainer gets an error at once.

    Raises:
        TransferError: the trainer is not there, died, gave up or was too slow; this torch lacks the backend;
            or a tensor is too large.
    """
    deadline = Deadline(request.timeout_s)
    try:
        progress = _Progress(lay_out((each.name, each.dtype, each.shape) for each in request.tensors))
        check_backend(request.backend)
        with _Connection(request, progress.entries, deadline) as connection:
            _receive_all(connection.join(), request.backend, device, sink, progress)
    except HeaderError as error:
        raise TransferError(str(error)) from error
    except GroupError as error:
        cause = str(error) if deadline.left_s else f"the {request.timeout_s:g} s are over"
        raise TransferError(f"{cause}; {progress}") from None


class _Progress:
    """Tensors and bytes received so far, for error messages."""

    def __init__(self, entries: Sequence[TensorEntry]) -> None:
        self.entries = entries
        self.num_tensors = 0
        self.num_bytes = 0

    def __str__(self) -> str:
        if self.num_tensors == len(self.entries):
            return "all tensors had arrived"
        entry = self.entries[self.num_tensors]
        return (
            f"{self.num_tensors} of {len(self.entries)} tensors had arrived, and {self.num_bytes} of "
            f"{entry.num_bytes} bytes of {entry.name!r}"
        )


class _Connection:
    """Connection to the trainer. As a context manager it reports an error to the trainer before it closes.

    Nothing else may hold the store, or the tracebacks of errors would keep the connection open.
    """

    def __init__(self, request: TransferRequest, entries: Sequence[TensorEntry], deadline: Deadline) -> None:
        self._backend, self._entries, self._deadline = request.backend, entries, deadline
        self._exit = contextlib.ExitStack()
        limit = Deadline(min(_CONNECTION_S, deadline.left_s))
        peer, self._address = _probe(request, limit)
        with _cut_at(limit, peer):
            self._store: Store | None = _connect(peer, limit)
        self._exit.enter_context(_cut_at(deadline, peer))

    def join(self) -> Group:
        """
        Raises:
            GroupError: the trainer does not join.
        """
        assert self._store is not None
        try:
            self._store.set(JOINED, json.dumps([entry.num_bytes for entry in self._entries]))
        except RuntimeError as error:
            raise GroupError(f"the trainer has disconnected: {reason(error)}") from None
        group = Group(
            self._store,
            1,
            backend=self._backend,
            address=self._address,
            deadline=self._deadline,
            formation=self._deadline,
        )
        return self._exit.enter_context(group)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if self._store is not None and kind is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(FAILED, str(error) or kind.__name__)
        self._exit.close()
        self._store = None


def _probe(request: TransferRequest, limit: Deadline) -> tuple[tuple[str, int], str]:
    """Address of the store, and the address from which this machine reaches it.

    TCPStore alone would retry a refused connection.
    """
    try:
        with socket.create_connection((request.host, request.port), limit.left_s) as probe:
            return probe.getpeername(), probe.getsockname()[0]
    except OSError as error:
        raise TransferError(f"no trainer at {request.host}:{request.port}: {error}") from error


def _connect(peer: tuple[str, int], limit: Deadline) -> Store:
    host, port = peer[:2]
    try:
        return TCPStore(host, port, is_master=False, timeout=limit.left, wait_for_workers=False)
    except RuntimeError as error:
        raise TransferError(f"no TCPStore at {host}:{port}: {reason(error)}") from None


@contextlib.contextmanager
def _cut_at(deadline: Deadline, peer: tuple[str, int]) -> Iterator[None]:
    """Close connections to the store after the deadline, while this lasts.

    TCPStore ignores its timeout where a server accepts and does not answer; and it reconnects.
    """
    is_over = threading.Event()

    def cut_until_over() -> None:
        limit_s = deadline.left_s
        while not is_over.wait(limit_s):
            _shut_down(peer)
            limit_s = _CUT_S

    thread = threading.Thread(target=cut_until_over, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _shut_down(peer: tuple[str, int]) -> None:
    """The port belongs to this transfer, so no other connection of the process leads there."""
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            # `fromfd` would leak its copy of a descriptor that is no socket.
            if path.is_socket():
                with socket.fromfd(int(path.name), socket.AF_INET6, socket.SOCK_STREAM) as each:
                    if _is_at(each.getpeername(), peer):
                        each.shutdown(socket.SHUT_RDWR)


def _is_at(name: object, peer: tuple[str, int]) -> bool:
    """Unix sockets have no tuple; torch's have IPv4 addresses mapped into IPv6."""
    return isinstance(name, tuple) and (str(name[0]).removeprefix("::ffff:"), name[1]) == peer[:2]


def _receive_all(
    group: Group, backend: str, device: torch.device, sink: Callable[[memoryview], None], progress: _Progress
) -> None:
    host = bytearray(PIECE_BYTES)
    on_host = torch.frombuffer(host, dtype=torch.uint8)
    buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device) if backend == "nccl" else on_host
    for entry in progress.entries:
        progress.num_bytes = 0
        for first, end in cut(entry.num_bytes, 1):
            piece = end - first
            group.broadcast(buffer[:piece], 0)
            if buffer is not on_host:
                on_host[:piece].copy_(buffer[:piece])
            sink(memoryview(host)[:piece])
            progress.num_bytes = end
        progress.num_tensors += 1
    group.broadcast(torch.zeros(1, dtype=torch.uint8, device=buffer.device), 1)
