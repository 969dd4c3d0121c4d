"""Bodies that bypass h11: they arrive whole however they are cut, and the connection stays usable."""

import asyncio
import contextlib
import hashlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPResponse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from shopr1_service.server import long_body
from shopr1_service.server.http_protocol import connection_class
from tests.support.http import WAIT_S, serving

BUFFER_BYTES = 1000
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"
Heard = list[Any]
"""Blocks and events that the application has seen."""


@pytest.fixture(scope="module", autouse=True)
def _small_buffers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_body, "BUFFER_BYTES", BUFFER_BYTES)
        yield


@pytest.fixture
def noting() -> Iterator[tuple[str, Heard]]:
    heard: Heard = []
    with serving(application(heard), http=connection_class(WAIT_S)) as url:
        yield url, heard


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(application(), http=connection_class(WAIT_S)) as url:
        yield url


def application(heard: Heard | None = None) -> Any:
    """Tells what it got; refuses without a look at the body; or notes each block when it comes."""

    async def digest(request: Request) -> Response:
        blocks = [bytes(block) async for block in request.stream()]
        content = b"".join(blocks)
        sizes = [len(block) for block in blocks if block]
        return JSONResponse({"sizes": sizes, "digest": hashlib.sha256(content).hexdigest()})

    async def refuse(_request: Request) -> Response:
        return Response(status_code=413)

    async def note(request: Request) -> Response:
        assert heard is not None
        try:
            async for block in request.stream():
                heard.append(bytes(block))
        except ClientDisconnect:
            heard.append("gone")
        return Response()

    routes = [Route(f"/{each.__name__}", each, methods=["PUT", "GET"]) for each in (digest, refuse, note)]
    return Starlette(routes=routes)


@contextlib.contextmanager
def connection(url: str) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield client


def head(path: str, num_bytes: int, *lines: str) -> bytes:
    given = [f"PUT {path} HTTP/1.1", "Host: x", f"Content-Length: {num_bytes}", *lines]
    return "".join(f"{line}\r\n" for line in [*given, ""]).encode()


def answered(client: socket.socket) -> tuple[int, Any]:
    with contextlib.closing(HTTPResponse(client)) as response:
        response.begin()
        content = response.read()
    return response.status, json.loads(content) if content else None


def body_of(num_bytes: int) -> bytes:
    return bytes(i * i % 251 for i in range(num_bytes))


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@settings(deadline=None, max_examples=60)
@given(
    num_bytes=st.integers(0, 5 * BUFFER_BYTES),
    cuts=st.lists(st.integers(0, 6 * BUFFER_BYTES), max_size=6),
)
def test_every_body_arrives_however_it_is_cut(server: str, num_bytes: int, cuts: list[int]) -> None:
    """Twice on one connection, and then a request without a body."""
    content = body_of(num_bytes)
    sent = head("/digest", num_bytes) + content
    with connection(server) as client:
        for _ in range(2):
            for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(sent)], strict=True):
                client.sendall(sent[start:end])
            status, said = answered(client)
            assert (status, said["digest"]) == (200, digest_of(content))
        client.sendall(b"GET /digest HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answered(client)[0] == 200


def test_buffers_are_handed_over_full(server: str) -> None:
    """Also the first, with what h11 had seen of it: numbers would else be cut in two."""
    content = body_of(3 * BUFFER_BYTES + 7)
    with connection(server) as client:
        client.sendall(head("/digest", len(content), "Expect: 100-continue") + content[:13])
        assert client.recv(len(GO_ON), socket.MSG_WAITALL) == GO_ON
        client.sendall(content[13:])
        said = answered(client)[1]
    assert said == {"sizes": [BUFFER_BYTES] * 3 + [7], "digest": digest_of(content)}


def test_a_pipelined_request_waits_for_its_turn(server: str) -> None:
    contents = [body_of(num) for num in (2 * BUFFER_BYTES, 3 * BUFFER_BYTES + 1, 0)]
    with connection(server) as client:
        client.sendall(b"".join(head("/digest", len(content)) + content for content in contents))
        received, digests = b"", list[bytes]()
        while len(digests) < len(contents):
            received += client.recv(2**16)
            digests = re.findall(rb'"digest":"(\w+)"', received)
    assert [digest.decode() for digest in digests] == [digest_of(content) for content in contents]


def test_100_continue_is_sent(server: str) -> None:
    content = body_of(2 * BUFFER_BYTES)
    with connection(server) as client:
        client.sendall(head("/digest", len(content), "Expect: 100-continue"))
        assert client.recv(len(GO_ON), socket.MSG_WAITALL) == GO_ON
        client.sendall(content)
        assert answered(client)[1]["digest"] == digest_of(content)


def test_a_refused_body_is_dropped_and_the_connection_kept(server: str) -> None:
    content = body_of(100 * BUFFER_BYTES)
    with connection(server) as client:
        client.sendall(head("/refuse", len(content)) + content[:1])
        assert answered(client)[0] == 413
        client.sendall(content[1:] + head("/digest", len(content)) + content)
        assert answered(client)[1]["digest"] == digest_of(content)


def test_a_part_is_handed_over_when_no_more_arrives(noting: tuple[str, Heard]) -> None:
    url, heard = noting
    content = body_of(2 * BUFFER_BYTES)
    with connection(url) as client:
        client.sendall(head("/note", len(content)))
        for start, end in [(0, 1), (1, 2), (2, BUFFER_BYTES + 9), (BUFFER_BYTES + 9, len(content))]:
            client.sendall(content[start:end])
            until(partial(has_arrived, heard, end))
        assert answered(client)[0] == 200
    assert b"".join(heard) == content


def test_a_client_that_disconnects_in_the_middle(noting: tuple[str, Heard]) -> None:
    url, heard = noting
    with connection(url) as client:
        client.sendall(head("/note", 2 * BUFFER_BYTES) + body_of(BUFFER_BYTES + 1))
    until(lambda: "gone" in heard)
    assert b"".join(heard[:-1]) in (body_of(BUFFER_BYTES), body_of(BUFFER_BYTES + 1))


def test_reading_stops_when_the_application_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit the server would fill its memory."""
    monkeypatch.setattr(long_body, "BUFFER_BYTES", 2**20)
    is_free, num_bytes = threading.Event(), 64 * 2**20

    async def wait(request: Request) -> Response:
        await asyncio.to_thread(is_free.wait, WAIT_S)
        return JSONResponse({"num_bytes": sum([len(block) async for block in request.stream()])})

    app = Starlette(routes=[Route("/wait", wait, methods=["PUT"])])
    with serving(app, http=connection_class(WAIT_S)) as url, connection(url) as client:
        client.sendall(head("/wait", num_bytes))
        content = memoryview(bytes(num_bytes))
        num_sent = sent_until_blocked(client, content)
        assert num_sent < num_bytes  # the rest stays with the client
        is_free.set()
        client.sendall(content[num_sent:])
        assert answered(client) == (200, {"num_bytes": num_bytes})


def sent_until_blocked(client: socket.socket, content: memoryview) -> int:
    num_sent = 0
    client.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        while num_sent < len(content):
            num_sent += client.send(content[num_sent : num_sent + 2**16])
    client.settimeout(WAIT_S)
    return num_sent


def test_over_tls(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    trusting = ssl.create_default_context(cafile=str(cert))
    content = body_of(500 * BUFFER_BYTES + 3)
    options = {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    with (
        serving(application(), http=connection_class(WAIT_S), **options) as url,
        connection(url) as plain,
        trusting.wrap_socket(plain, server_hostname="127.0.0.1") as client,
    ):
        for _ in range(2):
            client.sendall(head("/digest", len(content)) + content)
            status, said = answered(client)
            assert (status, said["digest"]) == (200, digest_of(content))
            assert BUFFER_BYTES in said["sizes"]


def test_h11_keeps_the_number_of_missing_bytes_where_we_read_and_reset_it() -> None:
    """The attribute is private. Before a new h11 is added here, check how its readers use `_remaining`."""
    assert version("h11") in {"0.16.0"}
    h11_connection = h11.Connection(h11.SERVER)
    h11_connection.receive_data(head("/digest", 10) + b"abc")
    assert isinstance(h11_connection.next_event(), h11.Request)
    assert long_body.num_bytes_left(h11_connection) == 10
    assert isinstance(h11_connection.next_event(), h11.Data)
    assert long_body.num_bytes_left(h11_connection) == 7
    h11_connection._reader._remaining = 0  # type: ignore[union-attr]
    assert isinstance(h11_connection.next_event(), h11.EndOfMessage)


def test_h11_receives_all_where_the_missing_bytes_are_unknown(
    monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    monkeypatch.setattr(long_body, "num_bytes_left", lambda _connection: 0)
    content = body_of(3 * BUFFER_BYTES)
    with connection(server) as client:
        client.sendall(head("/digest", len(content)) + content[:1])
        client.sendall(content[1:])
        said = answered(client)[1]
    assert said["digest"] == digest_of(content)
    assert said["sizes"] != [BUFFER_BYTES] * 3


def has_arrived(heard: Heard, num_bytes: int) -> bool:
    return sum(map(len, heard)) == num_bytes


def until(is_true: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S * 100)):
        if is_true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it does not happen")
