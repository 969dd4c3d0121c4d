"""Clients that do not read their answers lose them, and hold neither memory nor the end of the service."""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from shopr1_service.server import http_protocol
from shopr1_service.server.http_protocol import Connection, connection_class
from shopr1_service.server.unsent_answers import StallWatch
from tests.support.http import WAIT_S, serving

NUM_BYTES = 64 * 2**20
"""More than the sockets' buffers hold."""
GET = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"


class Server:
    """A server of a large answer; `num_lost` counts closed connections."""

    def __init__(self) -> None:
        self.url = ""
        self.num_lost = 0
        self.has_answered = threading.Event()

    @property
    def application(self) -> Starlette:
        async def large(_request: Request) -> Response:
            self.has_answered.set()
            return Response(bytes(NUM_BYTES))

        async def small(_request: Request) -> Response:
            return PlainTextResponse("small")

        return Starlette(routes=[Route("/large", large), Route("/small", small)])

    @contextlib.contextmanager
    def connected(self) -> Iterator[socket.socket]:
        host, port = self.url.split("//")[1].split(":")
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as client:
            yield client


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    found, lose = Server(), Connection.connection_lost

    def counting(self: Connection, exc: Exception | None) -> None:
        lose(self, exc)
        found.num_lost += 1

    monkeypatch.setattr(Connection, "connection_lost", counting)
    return found


@contextlib.contextmanager
def running(server: Server, timeout_s: float, **options: Any) -> Iterator[None]:
    with serving(server.application, http=connection_class(timeout_s), **options) as server.url:
        yield


def read_all(client: socket.socket) -> int:
    """Bytes of the answer's body."""
    with contextlib.closing(HTTPResponse(client)) as response:
        response.begin()
        return len(response.read())


@pytest.mark.parametrize("num_requests", [1, 3], ids=["one", "pipelined"])
def test_a_client_that_takes_nothing_loses_its_connection(server: Server, num_requests: int) -> None:
    with running(server, 0.3), server.connected() as client:
        client.sendall(GET * num_requests)
        until_lost(server)
        assert server.num_lost == 1


class Draining:
    """A transport of which a little more has been sent at each look."""

    def __init__(self, num_unsent: int, until: int) -> None:
        self.num_unsent, self.until = num_unsent, until
        self.is_aborted = asyncio.Event()

    def get_write_buffer_size(self) -> int:
        self.num_unsent = max(self.until, self.num_unsent - 1)
        return self.num_unsent

    def abort(self) -> None:
        self.is_aborted.set()


@pytest.mark.anyio
async def test_a_client_that_takes_its_time_gets_all() -> None:
    """It takes longer than the limit in all, and something each time."""
    transport = Draining(20, until=5)
    watch = StallWatch(transport, 0.01)  # type: ignore[arg-type]
    watch.begin()
    async with asyncio.timeout(WAIT_S):
        await transport.is_aborted.wait()
    assert transport.num_unsent == 5  # it was not given up before


@pytest.mark.anyio
async def test_nothing_is_aborted_after_the_end() -> None:
    transport = Draining(20, until=20)
    watch = StallWatch(transport, 0.01)  # type: ignore[arg-type]
    for _ in range(2):
        watch.begin()
    watch.end()
    watch.tighten(0.001)
    await asyncio.sleep(0.05)
    assert not transport.is_aborted.is_set()


def test_a_client_that_takes_all_keeps_its_connection(server: Server) -> None:
    with running(server, 0.3), server.connected() as client:
        for _ in range(2):
            client.sendall(GET)
            assert read_all(client) == NUM_BYTES
        client.sendall(GET.replace(b"large", b"small"))
        assert read_all(client) == len("small")


@pytest.mark.parametrize("num_requests", [1, 3], ids=["one", "pipelined"])
def test_the_end_of_the_service_does_not_wait_for_a_stalled_reader(
    server: Server, monkeypatch: pytest.MonkeyPatch, num_requests: int
) -> None:
    """The server has no limit for its end but this one."""
    monkeypatch.setattr(http_protocol, "_ENDING_STALL_S", 0.2)
    with contextlib.ExitStack() as clients:
        with running(server, 3600.0):
            client = clients.enter_context(server.connected())
            client.sendall(GET * num_requests)
            assert server.has_answered.wait(WAIT_S)
        assert server.num_lost == 1


def test_the_end_of_the_service_waits_for_a_reader(server: Server) -> None:
    received: list[int] = []

    def read() -> None:
        with server.connected() as client:
            client.sendall(GET)
            received.append(read_all(client))

    reader = threading.Thread(target=read)
    with running(server, 3600.0):
        reader.start()
        assert server.has_answered.wait(WAIT_S)
    reader.join()
    assert received == [NUM_BYTES]


@pytest.mark.parametrize("path", [b"small", b"large"])
def test_the_end_of_the_service_does_not_wait_for_clients_to_confirm_it_over_tls(
    server: Server, monkeypatch: pytest.MonkeyPatch, certificate: tuple[Path, Path], path: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "_ENDING_STALL_S", 0.2)
    monkeypatch.setattr("asyncio.constants.SSL_SHUTDOWN_TIMEOUT", 3600.0)
    cert, key = certificate
    trusting = ssl.create_default_context(cafile=str(cert))
    with contextlib.ExitStack() as clients:
        with running(server, 3600.0, ssl_certfile=str(cert), ssl_keyfile=str(key)):
            plain = clients.enter_context(server.connected())
            client = clients.enter_context(trusting.wrap_socket(plain, server_hostname="127.0.0.1"))
            client.sendall(GET.replace(b"large", path))
            assert client.recv(1)  # it reads no more, and does not confirm the end
        assert server.num_lost == 1


def until_lost(server: Server) -> None:
    for _ in range(int(WAIT_S * 100)):
        if server.num_lost:
            return
        threading.Event().wait(0.01)
    raise AssertionError("it is kept")
