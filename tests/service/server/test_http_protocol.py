"""Slow and silent clients: they lose their connection, and others are not affected."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest
import uvicorn

from shopr1_client import Client
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.server.http_protocol import connection_class
from shopr1_service.settings import Settings
from shopr1_service.updates.updatable_engine import UpdatableEngine
from tests.support.http import WAIT_S, answer, group, serving
from tests.support.models import policy_of, tiny_model
from tests.support.updating import adapter_file, changed_model, file_of

TIMEOUT_S = 0.3
BODY = json.dumps({"groups": [group(answer())]}).encode()
HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def server() -> Iterator[str]:
    app = create_app(Settings(receive_timeout_s=TIMEOUT_S), LocalEngine.opener(FakePolicy))
    with serving(app, http=connection_class(TIMEOUT_S)) as url, Client(url) as client:
        client.wait_until_ready(WAIT_S)
        yield url


@contextlib.contextmanager
def connection(url: str) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as client:
        yield client


def rest(client: socket.socket) -> bytes:
    """All bytes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(65_536):
            received += data
    return received


def answered_status(client: socket.socket) -> int:
    response = HTTPResponse(client)
    response.begin()
    response.read()
    return response.status


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"POST /sc", id="half a line"),
        pytest.param(HEAD[:40], id="half a head"),
    ],
)
def test_a_head_that_does_not_come_ends_the_connection(server: str, sent: bytes) -> None:
    with connection(server) as client:
        client.sendall(sent)
        assert rest(client) == b""


def test_drops_do_not_set_the_time_back(server: str) -> None:
    with connection(server) as client:
        client.sendall(b"GET /info HTTP/1.1\r\nX: ")
        client.settimeout(0.01)
        # If each drop bought time, all would be taken.
        assert any(is_closed_after(client, b"x") for _ in range(int(WAIT_S * 100)))


def is_closed_after(client: socket.socket, drop: bytes) -> bool:
    try:
        client.sendall(drop)
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_a_body_that_does_not_come_is_answered_408(server: str) -> None:
    with connection(server) as client:
        client.sendall(HEAD % len(BODY) + BODY[:-1])
        answered = rest(client)
    assert answered.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answered
    assert b"receive_timeout_s = 0.3" in answered


def test_a_refused_body_is_not_waited_for_longer(server: str) -> None:
    with connection(server) as client:
        client.sendall(HEAD % 2**40 + b"{")
        answered = rest(client)  # ends, because the server closes
    assert answered.startswith(b"HTTP/1.1 413 ")


def test_a_request_in_pieces_that_come_in_time(server: str) -> None:
    with connection(server) as client:
        for _ in range(3):
            for piece in (HEAD[:20], HEAD[20:] % len(BODY), BODY[:9], BODY[9:]):
                client.sendall(piece)
            assert answered_status(client) == 200


def test_others_are_served_while_many_are_slow(server: str) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connection(server)).sendall(b"POST /score HTTP/1.1\r\nX: ")
        with connection(server) as client:
            client.sendall(HEAD % len(BODY) + BODY)
            assert answered_status(client) == 200


# --- bodies that are weights ------------------------------------------------------------------------

PUT = b"PUT %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
WEIGHTS = b"/policy/weights?version=1"
LINGER_S = 0.3


@pytest.fixture(params=[100, 2**40], ids=["long body", "by h11"])
def updatable_server(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    monkeypatch.setattr("shopr1_service.server.http_protocol._LINGER_S", LINGER_S)
    monkeypatch.setattr("shopr1_service.server.long_body.BUFFER_BYTES", request.param)
    app = create_app(
        Settings(receive_timeout_s=TIMEOUT_S), UpdatableEngine.opener(lambda: policy_of(tiny_model()))
    )
    with serving(app, http=connection_class(TIMEOUT_S)) as url, Client(url) as client:
        client.wait_until_ready(WAIT_S)
        yield url


@pytest.mark.parametrize(
    ("path", "content"),
    [(WEIGHTS, file_of(changed_model())), (b"/policy/adapters/a", adapter_file())],
    ids=["weights", "adapter"],
)
def test_weights_may_take_longer_as_long_as_they_come(
    updatable_server: str, path: bytes, content: bytes
) -> None:
    """Longer in all than the timeouts of the body and of the connection, on a connection that is kept."""
    with connection(updatable_server) as client:
        for _ in range(2):
            start_s, num_sent = time.monotonic(), 0
            client.sendall(PUT % (path, len(content)))
            while time.monotonic() < start_s + 2 * (TIMEOUT_S + LINGER_S):
                client.sendall(content[num_sent : num_sent + 1])
                num_sent += 1
                time.sleep(TIMEOUT_S / 20)  # a slow client; nothing waits for it
            client.sendall(content[num_sent:])
            assert answered_status(client) == 200


@pytest.mark.parametrize("num_sent", [0, 1, 100_000])
def test_weights_that_stop_coming_are_answered_408(updatable_server: str, num_sent: int) -> None:
    content = file_of(changed_model())
    with connection(updatable_server) as client:
        client.sendall(PUT % (WEIGHTS, len(content)) + content[:num_sent])
        answered = rest(client)  # ends, because the server closes
    assert answered.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answered
    with connection(updatable_server) as client:
        client.sendall(PUT % (WEIGHTS, len(content)) + content)
        assert answered_status(client) == 200


def test_other_bodies_must_arrive_in_time_as_a_whole(updatable_server: str) -> None:
    with connection(updatable_server) as client:
        client.sendall(HEAD.replace(b"/score", b"/policy/update") % 2**20)
        client.settimeout(0.01)
        assert any(is_closed_after(client, b" ") for _ in range(int(WAIT_S * 100)))


def test_the_class_is_uvicorns_own_kind() -> None:
    config = uvicorn.Config(lambda: None, http=connection_class(7.0))
    config.load()
    assert config.http_protocol_class.receive_timeout_s == 7.0  # type: ignore[attr-defined]
