"""Thousands of bad connections, and more connections than file descriptors: memory, health, log."""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from email.message import Message
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest

from shopr1_client import Client
from shopr1_client.wire import ScoreRequest
from tests.support.fake_server import HELD
from tests.support.http import WAIT_S
from tests.support.process import FAKE, Process, logging_process, process, request
from tests.support.raw_clients import leave, read, read_to_end, reset

pytestmark = pytest.mark.timeout(900)

KEY = "a-key-of-0123456789"  # pragma: allowlist secret
WITH_KEY = f"Authorization: Bearer {KEY}\r\n"
HEAD = "POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n"
MAX_BODY_BYTES = 32 * 2**20
LONG = MAX_BODY_BYTES - 1

NUM_CONNECTIONS = 5000
AT_ONCE = 100
MAX_GROWTH_BYTES = 20 * 2**20


# --- memory -----------------------------------------------------------------------------------------


def head(length: int, *, with_key: bool) -> bytes:
    return (HEAD % (length, WITH_KEY if with_key else "")).encode()


KINDS: dict[str, tuple[bytes, Callable[[socket.socket], None]]] = {
    "refused": (head(LONG, with_key=False) + b"{" * 1000, read),
    "oversized": (head(2**40, with_key=True) + b"{" * 1000, read),
    "slow": (head(LONG, with_key=False)[:60], read_to_end),
    "slow with a body": (head(LONG, with_key=True) + b" " * 1000, read),
    "cut": (head(LONG, with_key=True) + b" " * 100_000, leave),
    "reset": (head(LONG, with_key=True) + b" " * 100_000, reset),
}


def misbehave(port: int, kind: str, num: int) -> None:
    sent, then = KINDS[kind]
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S))
            for _ in range(num)
        ]
        for client in clients:
            client.sendall(sent)
        for client in clients:
            then(client)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_bad_connections(kind: str) -> None:
    settings = {
        "SHOPR1_API_KEYS": KEY,
        "SHOPR1_RECEIVE_TIMEOUT_S": "0.5",
        "SHOPR1_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
    }
    with process(*FAKE, **settings) as server:
        misbehave(server.port, kind, 2 * AT_ONCE)  # pools and caches fill
        before = server.rss_bytes()
        for _ in range(NUM_CONNECTIONS // AT_ONCE):
            misbehave(server.port, kind, AT_ONCE)
        # The last ones may still be open.
        until(lambda: server.rss_bytes() - before < MAX_GROWTH_BYTES)


def until(is_true: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S * 100)):
        if is_true():
            return
        time.sleep(0.01)
    raise AssertionError("it does not happen")


# --- file descriptors -------------------------------------------------------------------------------

MAX_FILES = 256
NUM_IDLE = 4 * MAX_FILES
NUM_BUSY = 2 * MAX_FILES


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def small(log: Path) -> Iterator[Process]:
    """A server with few file descriptors."""
    with logging_process(log, *FAKE, MAX_OPEN_FILES=str(MAX_FILES), SHOPR1_LOG_LEVEL="warning") as server:
        yield server


def is_live(server: Process) -> bool:
    return httpx.get(f"{server.url}/health/live", timeout=WAIT_S).is_success


@pytest.mark.parametrize("sent", [b"", b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n", b"POST /sc"])
def test_idle_connections_make_room_for_others(small: Process, log: Path, sent: bytes) -> None:
    start_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        for i in range(NUM_IDLE):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", small.port), timeout=WAIT_S))
            with contextlib.suppress(ConnectionError):
                client.sendall(sent)
            if i % MAX_FILES == 0:
                assert is_live(small)
        assert is_live(small)
        with Client(small.url, retry_for_s=WAIT_S) as other:
            scored = other.score(ScoreRequest.model_validate(request()))
        assert scored.groups[0].rewards[0].reward == 0.93
    check_log(log, time.monotonic() - start_s)


def test_busy_connections_stay_and_health_is_answered(small: Process, log: Path) -> None:
    """The requests beyond the limit get 503, and their clients can send them again."""
    start_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(asking(small, HELD if i == 0 else "page")) for i in range(NUM_BUSY)]
        small.wait_until_scoring()
        for _ in range(20):
            assert is_live(small)
        small.release()
        answered = [response_of(client) for client in clients]
    statuses = [status for status, _, _ in answered]
    assert statuses.count(200) >= MAX_FILES // 2
    assert set(statuses) == {200, 503}
    for status, headers, body in answered:
        if status == 503:
            assert (body["code"], body["detail"]) == ("not_ready", "too many connections are open")
            assert int(headers["Retry-After"]) >= 1
            assert headers["Connection"] == "close"
    small.check_reward()
    check_log(log, time.monotonic() - start_s)


@contextlib.contextmanager
def asking(server: Process, prompt: str) -> Iterator[socket.socket]:
    """A connection that has sent a request, as soon as it was there."""
    body = json.dumps(request(prompt)).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as client:
        client.sendall((HEAD % (len(body), "")).encode() + body)
        yield client


def response_of(client: socket.socket) -> tuple[int, Message, Any]:
    with contextlib.closing(HTTPResponse(client)) as response:
        response.begin()
        return response.status, response.headers, json.loads(response.read())


def check_log(log: Path, duration_s: float) -> None:
    """One line a second at most, and it says what to do."""
    lines = log.read_text().splitlines()
    assert 1 <= len(lines) <= duration_s + 1, lines[:5]
    assert all("no room for more connections" in line for line in lines), lines[:5]
