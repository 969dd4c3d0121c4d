"""A proxy that breaks connections after the service has answered, and a client that does not wait."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from tests.support.http import WAIT_S

_HOP_BY_HOP = {"connection", "host", "content-length", "transfer-encoding"}


@dataclass
class BreakingProxy:
    """Breaks the connections of the first requests.

    Attributes:
        num_to_break: how many are still to be broken.
        num_sent_bytes: bytes of the response's body that the client gets before.
        headers: of every request.
    """

    url: str
    num_to_break: int = 0
    num_sent_bytes: int = 0
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def is_broken(self, headers: dict[str, str]) -> bool:
        with self.lock:
            self.headers.append(headers)
            self.num_to_break -= 1
            return self.num_to_break >= 0


@contextmanager
def breaking_proxy(url: str, **options: Any) -> Iterator[BreakingProxy]:
    """A proxy of POST requests to a service."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            sent = {name: value for name, value in headers.items() if name not in _HOP_BY_HOP}
            response = httpx.post(url + self.path, content=body, headers=sent, timeout=WAIT_S)
            is_broken = proxy.is_broken(headers)
            self.close_connection = is_broken
            if is_broken and not proxy.num_sent_bytes:
                return
            self.send_response(response.status_code)
            self.send_header("Content-Type", response.headers["Content-Type"])
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content[: proxy.num_sent_bytes if is_broken else None])

        def log_message(self, *_args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        proxy = BreakingProxy(f"http://127.0.0.1:{server.server_port}", **options)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def leaving(url: str, path: str, body: Any, **headers: str) -> Iterator[None]:
    """A client that has sent a request, and disconnects at the end of the block, before the response."""
    target = httpx.URL(url)
    request = httpx.Request("POST", url + path, json=body, headers=headers)
    with socket.create_connection((target.host, target.port or 80)) as connection:
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        yield
