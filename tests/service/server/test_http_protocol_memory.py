"""Memory that strangers and bad clients take: no buffer without a key, no connection after its end."""

import contextlib
import gc
import json
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from shopr1_client import Client
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server import http_protocol
from shopr1_service.server.app import create_app
from shopr1_service.server.http_protocol import Connection, connection_class
from shopr1_service.server.long_body import LongBody
from shopr1_service.settings import Settings
from tests.support.http import WAIT_S, answer, group, serving
from tests.support.raw_clients import leave, read, read_to_end, reset

KEY = "a-key-of-0123456789"  # pragma: allowlist secret
BODY = json.dumps({"groups": [group(answer())]}).encode()
MANY = 2**33
"""More bytes than any limit."""


@dataclass
class Server:
    """A server with keys; `connections` and `buffer_sizes_bytes` grow with every one that it makes."""

    url: str
    connections: list[weakref.ref[Connection]] = field(default_factory=list)
    buffer_sizes_bytes: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def connected(self) -> Iterator[socket.socket]:
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as client:
            yield client


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with watched() as found:
        with Client(found.url) as client:
            client.wait_until_ready(WAIT_S)
        yield found


@contextlib.contextmanager
def watched(**options: Any) -> Iterator[Server]:
    found = Server("")
    make, renew = Connection.connection_made, LongBody._renew_buffer

    def noting_connection(self: Connection, transport: object) -> None:
        found.connections.append(weakref.ref(self))
        make(self, transport)  # type: ignore[arg-type]

    def noting_buffer(self: LongBody, num_bytes: int) -> None:
        found.buffer_sizes_bytes.append(num_bytes)
        renew(self, num_bytes)

    settings = Settings(api_keys=(SecretStr(KEY),), receive_timeout_s=0.3, max_body_bytes=2**24)
    app = create_app(settings, LocalEngine.opener(FakePolicy))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "connection_made", noting_connection)
        patch.setattr(LongBody, "_renew_buffer", noting_buffer)
        patch.setattr(http_protocol, "_LINGER_S", 0.1)
        with serving(app, http=connection_class(0.3), **options) as found.url:
            yield found


def head(length: int, *lines: str, path: str = "/score") -> bytes:
    first = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        f"Content-Length: {length}",
        "Content-Type: application/json",
    ]
    return "".join(f"{line}\r\n" for line in [*first, *lines, ""]).encode()


WITH_KEY = f"Authorization: Bearer {KEY}"
CHUNKED = head(0, WITH_KEY).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")


def read_and_reset(client: socket.socket) -> None:
    read(client)
    reset(client)


STRANGERS = {
    "no key": (head(MANY), read),
    "no key, a part of the body": (head(MANY) + b"{" * 100_000, read),
    "no key, then slow": (head(MANY) + b"{", read_to_end),
    "no key, expects to go on": (head(MANY, "Expect: 100-continue"), read),
    "no key, reset": (head(MANY), read_and_reset),
    "a wrong key": (head(MANY, "Authorization: Bearer wrong"), read),
    "an unknown path": (head(MANY, path="/nowhere"), read),
    "a path without a key": (head(MANY, path="/health/live"), read),
    "too large": (head(MANY, WITH_KEY), read),
    "too large, reset": (head(MANY, WITH_KEY) + b"{" * 100_000, read_and_reset),
}
BAD_CLIENTS = {
    "nothing": (b"", leave),
    "nothing, waits": (b"", read_to_end),
    "half a head": (b"POST /score HT", leave),
    "half a head, slow": (b"POST /score HT", read_to_end),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", read_to_end),
    "no chunk": (CHUNKED + b"zz\r\n", read_to_end),
    "cut": (head(100, WITH_KEY) + b"{", leave),
    "cut by a reset": (head(100, WITH_KEY) + b"{", reset),
    "cut in a long body": (head(2**23, WITH_KEY) + b" " * 100_000, leave),
    "a long body by chunks, cut": (CHUNKED + b"fffff\r\n{", reset),
    "slow": (head(100, WITH_KEY) + b"{", read_to_end),
    "slow in a long body": (head(2**23, WITH_KEY) + b" " * 100_000, read_to_end),
}
GOOD_CLIENTS = {
    "a reward": (head(len(BODY), WITH_KEY) + BODY, read),
    "a reward, then reset": (head(len(BODY), WITH_KEY) + BODY, read_and_reset),
    "a long body": (head(2**23, WITH_KEY) + BODY + b" " * (2**23 - len(BODY)), read),
    "two requests": (2 * (head(len(BODY), WITH_KEY) + BODY), read),
}


@pytest.mark.parametrize(("sent", "then"), STRANGERS.values(), ids=STRANGERS)
def test_no_buffer_for_a_body_that_is_refused(
    server: Server, sent: bytes, then: Callable[[socket.socket], None]
) -> None:
    server.buffer_sizes_bytes.clear()
    with server.connected() as client:
        client.sendall(sent)
        then(client)
    assert server.buffer_sizes_bytes == []


def test_with_a_key_a_long_body_is_buffered(server: Server) -> None:
    """Else the test above would test nothing."""
    server.buffer_sizes_bytes.clear()
    with server.connected() as client:
        client.sendall(GOOD_CLIENTS["a long body"][0])
        read(client)
    assert max(server.buffer_sizes_bytes) >= 2**22


EVERYBODY = STRANGERS | BAD_CLIENTS | GOOD_CLIENTS


@pytest.mark.parametrize(("sent", "then"), EVERYBODY.values(), ids=EVERYBODY)
def test_a_closed_connection_is_freed_at_once(
    server: Server, sent: bytes, then: Callable[[socket.socket], None]
) -> None:
    """Without the garbage collector, which may not come for hours to the oldest objects."""
    gc.collect()
    server.connections.clear()
    gc.disable()
    try:
        with server.connected() as client:
            client.sendall(sent)
            then(client)
        until(lambda: bool(server.connections) and not any(each() for each in server.connections))
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["no key", "cut by a reset", "a path without a key"])
def test_so_is_one_over_tls(
    certificate: tuple[Path, Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = certificate
    trusting = ssl.create_default_context(cafile=str(cert))
    sent, then = EVERYBODY[kind]
    with watched(ssl_certfile=str(cert), ssl_keyfile=str(key)) as server:
        gc.collect()
        gc.disable()
        try:
            with (
                server.connected() as plain,
                trusting.wrap_socket(plain, server_hostname="127.0.0.1") as client,
            ):
                client.sendall(sent)
                then(client)
            until(lambda: bool(server.connections) and not any(each() for each in server.connections))
        finally:
            gc.enable()
    assert "Traceback" not in caplog.text


def until(is_true: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S * 100)):
        if is_true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it stays")
