"""Transfer of weights by a broadcast: an HTTP request announces the tensors, and its response is the result.

Torch is imported only when a transfer starts.
"""

import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import httpx

from shopr1_client.errors import TransportError
from shopr1_client.updates.weights import Weights
from shopr1_client.wire_policy import TransferRequest

if TYPE_CHECKING:
    from shopr1_client.updates.broadcast import TransferStore

DEFAULT_TIMEOUT_S = 300.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transfer:
    """A broadcast of weights to one server at a time.

    Attributes:
        host: this machine's address, as the server sees it; None: its address on the route to it.
        timeout_s: for the whole transfer.
    """

    weights: Weights
    version: str
    partial: bool
    backend: Literal["gloo", "nccl"]
    host: str | None
    timeout_s: float

    def send(self, http: httpx.Client, url: str) -> httpx.Response:
        """The server's response, also if the broadcast failed.

        Raises:
            ValueError: no store can be served at `host`.
        """
        from shopr1_client.updates.broadcast import BroadcastError, broadcast

        with self._store(url) as store, ThreadPoolExecutor(1) as pool:
            body = self._request(store.host, store.port).model_dump_json()
            asked = pool.submit(http.post, f"{url}/policy/transfer", content=body)
            # A response before the end of the broadcast is a refusal.
            asked.add_done_callback(lambda _: store.cancel())
            try:
                broadcast(store, self.weights.values(), backend=self.backend, timeout_s=self.timeout_s)
            except BroadcastError as error:  # the server reports an error, too
                if not asked.done():
                    _logger.warning("the broadcast of version %s broke off: %s", self.version, error)
            return asked.result()

    def _store(self, url: str) -> "TransferStore":
        from shopr1_client.updates.broadcast import BroadcastError, serve_store

        try:
            return serve_store(self.host or _own_address(url), self.timeout_s)
        except BroadcastError as error:
            raise ValueError(str(error)) from error

    def _request(self, host: str, port: int) -> TransferRequest:
        return TransferRequest(
            version=self.version,
            partial=self.partial,
            backend=self.backend,
            host=host,
            port=port,
            timeout_s=self.timeout_s,
            tensors=self.weights.specs,
        )


def _own_address(url: str) -> str:
    """Address of this machine on the route to a server."""
    server = httpx.URL(url)
    try:
        [(family, kind, _, _, address), *_] = socket.getaddrinfo(
            server.host, server.port or 80, type=socket.SOCK_DGRAM
        )
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise TransportError(f"no route to {url}: {error!r}") from error
