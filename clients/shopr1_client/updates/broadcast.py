"""A trainer's weights to the service, in a torch.distributed group that is made for one transfer.

    with serve_store(host, timeout_s) as store:
        # In a second thread: the HTTP request, which names `store.host` and `store.port`. Where that
        # fails: `store.cancel()`.
        broadcast(store, tensors, backend="gloo", timeout_s=timeout_s)

What passes between the two, for whoever writes a trainer's side without this module:

1. The trainer (rank 0) serves a TCPStore. The service (rank 1) connects to it and sets the key `joined`
   to the number of bytes of each tensor that was announced, as a JSON list.
2. Both make the group, on keys of the store that begin with `group/`.
3. Rank 0 broadcasts every tensor as bytes, in the pieces that `pieces.cut` gives. An empty tensor has none.
4. Rank 1 broadcasts one byte when it has used them all. If it gives up, it sets the key `failed`: why.
"""

import json
import socket
import threading
from collections.abc import Iterable
from datetime import timedelta
from itertools import zip_longest
from typing import Self

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from shopr1_client.updates.chunks import cut
from shopr1_client.updates.process_group import Deadline, Group, GroupError, check_backend

JOINED, FAILED = "joined", "failed"
"""Keys in the store, see the module."""

_POLL_S = 0.02
_NUM_ASKS = 10
_FORMATION_S = 10.0
"""For making the group once the service has joined; it takes milliseconds."""


class BroadcastError(Exception):
    """The service did not get the weights."""


class TransferStore:
    """The TCPStore of one transfer, made by `serve_store`. A context manager.

    Attributes:
        host: the address that it is bound to.
        port: chosen by the system.
        inner: None once it is closed. Nobody else may hold it: it is served as long as somebody does.
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
        """End `broadcast` within a second. From any thread, at any time."""
        self._cancelled.set()

    def close(self) -> None:
        """The service, if it still waits, gets an error at once."""
        self.inner = None

    def wait_for_service(self, deadline: Deadline) -> list[int]:
        """How many bytes the service expects of each tensor.

        Raises:
            BroadcastError: it was cancelled, the service has given up or it did not come in time.
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
            BroadcastError: it was cancelled, or the service has given up.
        """
        if self._cancelled.is_set():
            raise BroadcastError("cancelled")
        if self.inner is not None and self.inner.check([FAILED]):
            raise BroadcastError(
                f"the service has given up: {self.inner.get(FAILED).decode(errors='replace')}"
            )

    def ask_why(self) -> None:
        """The same after something has failed: the connection is closed about when the reason comes."""
        for _ in range(_NUM_ASKS):
            self.check()
            self._cancelled.wait(_POLL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def serve_store(host: str, timeout_s: float) -> TransferStore:
    """Where the two meet. It is not encrypted and knows no passwords: for networks whose hosts are trusted.

    Args:
        host: a name or an address of this machine. The service must reach it, gloo's own connection too.
        timeout_s: for a single operation on it.

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
        raise BroadcastError(
            f"{host!r} is no address that the service can connect to: name one of this machine's"
        )
    try:
        return TransferStore(listener, timeout_s)
    finally:
        listener.close()


def broadcast(store: TransferStore, tensors: Iterable[Tensor], *, backend: str, timeout_s: float) -> None:
    """Send the tensors; returns when the service has used the last of them. The store is closed then.

    Args:
        store: of this transfer alone.
        tensors: in the order, shapes and dtypes that were announced, on any device. Taken one by one.
        backend: `gloo` or `nccl`. gloo sends from the CPU.
        timeout_s: for all of it. Making a tensor is not interrupted.

    Raises:
        BroadcastError: the service did not join, is gone, has given up or was too slow; it was cancelled; or
            the tensors are not those that were announced.
    """
    deadline = Deadline(timeout_s)
    try:
        check_backend(backend)
        sizes = store.wait_for_service(deadline)
        with _group(store, backend, deadline) as group:
            _send_all(group, tensors, sizes, "cuda" if backend == "nccl" else "cpu")
    except GroupError as error:
        store.ask_why()
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
            # More than was expected would end the service's process: gloo knows no other answer.
            raise BroadcastError(f"tensor {index} has {tensor.nbytes} bytes, and {num_bytes} were announced")
        _send(group, tensor.detach(), device)
    group.broadcast(torch.empty(1, dtype=torch.uint8, device=device), 1)


def _send(group: Group, tensor: Tensor, device: str) -> None:
    flat = tensor.reshape(-1)
    for first, end in cut(flat.numel(), flat.element_size()):
        piece = flat[first:end]
        on_device = piece if piece.device.type == device else piece.to(device)
        group.broadcast(on_device.view(torch.uint8), 0)
