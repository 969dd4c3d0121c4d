"""Trainer's side of a broadcast of weights, in a torch.distributed group that exists for one transfer.

    with serve_store(host, timeout_s) as store:
        # In a second thread: the HTTP request, which names `store.host` and `store.port`. If it fails:
        # `store.cancel()`.
        broadcast(store, tensors, backend="gloo", timeout_s=timeout_s)

Protocol:

1. The trainer (rank 0) serves a TCPStore. The service (rank 1) connects to it and sets the key `joined` to a
   JSON list of the announced tensors' sizes in bytes.
2. Both make the group, on keys of the store that begin with `group/`.
3. Rank 0 broadcasts every tensor as bytes, in the pieces that `cut` gives. An empty tensor has none.
4. Rank 1 broadcasts one byte when it has used them all. If it gives up, it sets the key `failed`: why.
"""

import json
import socket
import threading
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import zip_longest
from typing import Self

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from shopr1_client.updates.process_group import Deadline, Group, GroupError, check_backend

JOINED, FAILED = "joined", "failed"
"""Keys in the store, see the protocol above."""
PIECE_BYTES = 16 * 2**20
"""Size of one broadcast. From 4 MiB on, gloo is about as fast as the loopback interface."""

_POLL_S = 0.02
_NUM_CHECKS = 10
_FORMATION_S = 10.0
"""Time limit for making the group once the service has joined; it takes milliseconds."""


class BroadcastError(Exception):
    """The service did not receive the weights."""


class TransferStore:
    """TCPStore of one transfer, made by `serve_store`; a context manager.

    Attributes:
        host: bound address.
        port: chosen by the system.
        inner: None once it is closed. Nothing else may hold it: it is served as long as it is referenced.
    """

    def __init__(self, listener: socket.socket, timeout_s: float) -> None:
        self.host: str
        self.port: int
        self.host, self.port = listener.getsockname()[:2]
        self._cancelled = threading.Event()
        self.inner: TCPStore | None = TCPStore(
            self.host,
            self.port,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def cancel(self) -> None:
        """End `broadcast` within a second. Thread-safe."""
        self._cancelled.set()

    def close(self) -> None:
        """Close it; a service that still waits gets an error at once."""
        self.inner = None

    def wait_for_service(self, deadline: Deadline) -> list[int]:
        """Sizes of the tensors that the service expects, bytes.

        Raises:
            BroadcastError: cancelled, the service has given up or did not join in time.
        """
        if self.inner is None:
            raise BroadcastError("the store is closed: every transfer needs its own")
        while not self.inner.check([JOINED]):
            self.check()
            if not deadline.left_s:
                raise BroadcastError(f"the service has not joined within {deadline.timeout_s:g} s")
            self._cancelled.wait(_POLL_S)
        sizes: list[int] = json.loads(self.inner.get(JOINED))
        return sizes

    def check(self) -> None:
        """
        Raises:
            BroadcastError: cancelled, or the service has given up.
        """
        if self._cancelled.is_set():
            raise BroadcastError("cancelled")
        if self.inner is not None and self.inner.check([FAILED]):
            raise BroadcastError(
                f"the service has given up: {self.inner.get(FAILED).decode(errors='replace')}"
            )

    def check_repeatedly(self) -> None:
        """`check` after a failure: the reason may arrive a little after the connection was closed."""
        for _ in range(_NUM_CHECKS):
            self.check()
            self._cancelled.wait(_POLL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def serve_store(host: str, timeout_s: float) -> TransferStore:
    """Serve the store of one transfer. It has neither encryption nor passwords: trusted networks only.

    Args:
        host: name or address of this machine, to which the service and gloo can connect.
        timeout_s: of a single operation.

    Raises:
        BroadcastError: it cannot be served there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise BroadcastError(f"no store can be served at {host!r}: {error}") from error
    if listener.getsockname()[0] in ("0.0.0.0", "::"):
        listener.close()
        raise BroadcastError(f"the service cannot connect to {host!r}: name one of this machine's addresses")
    try:
        return TransferStore(listener, timeout_s)
    finally:
        listener.close()


def broadcast(store: TransferStore, tensors: Iterable[Tensor], *, backend: str, timeout_s: float) -> None:
    """Send the tensors; returns when the service has used the last of them, and closes the store.

    Args:
        store: of this transfer only.
        tensors: with the announced order, shapes and dtypes, on any device; consumed one by one.
        backend: `gloo`, which sends from the CPU, or `nccl`.
        timeout_s: for the whole transfer; the iterator is not interrupted.

    Raises:
        BroadcastError: the service did not join, has died, has given up or was too slow; cancelled; or the
            tensors are not the announced ones.
    """
    deadline = Deadline(timeout_s)
    try:
        check_backend(backend)
        sizes = store.wait_for_service(deadline)
        with _group(store, backend, deadline) as group:
            _send_all(group, tensors, sizes, "cuda" if backend == "nccl" else "cpu")
    except GroupError as error:
        store.check_repeatedly()
        raise BroadcastError(str(error)) from None
    finally:
        store.close()


def _group(store: TransferStore, backend: str, deadline: Deadline) -> Group:
    assert store.inner is not None
    formation = Deadline(min(_FORMATION_S, deadline.left_s))
    return Group(
        store.inner,
        0,
        backend=backend,
        address=store.host,
        deadline=deadline,
        formation=formation,
        check=store.check,
    )


def _send_all(group: Group, tensors: Iterable[Tensor], sizes: list[int], device: str) -> None:
    for index, (tensor, num_bytes) in enumerate(zip_longest(tensors, sizes)):
        if tensor is None or num_bytes is None:
            raise BroadcastError(
                f"{len(sizes)} tensors were announced, not {'more' if num_bytes is None else index}"
            )
        if tensor.nbytes != num_bytes:
            # More bytes than expected would make gloo end the service's process.
            raise BroadcastError(f"tensor {index} has {tensor.nbytes} bytes, and {num_bytes} were announced")
        _send(group, tensor.detach(), device)
    group.broadcast(torch.empty(1, dtype=torch.uint8, device=device), 1)


def _send(group: Group, tensor: Tensor, device: str) -> None:
    flat = tensor.reshape(-1)
    for first, end in cut(flat.numel(), flat.element_size()):
        piece = flat[first:end]
        on_device = piece if piece.device.type == device else piece.to(device)
        group.broadcast(on_device.view(torch.uint8), 0)


def cut(num_elements: int, element_bytes: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of elements, one for each piece that both sides broadcast.

    Args:
        element_bytes: size of an element, at most `PIECE_BYTES`.

    >>> list(cut(5 * 2**20, 8))
    [(0, 2097152), (2097152, 4194304), (4194304, 5242880)]
    >>> list(cut(1, 2)), list(cut(0, 4))
    ([(0, 1)], [])
    """
    step = PIECE_BYTES // element_bytes
    for first in range(0, num_elements, step):
        yield first, min(first + step, num_elements)
