"""Connections that are closed at the moment of their use, and connections that outlive their client."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import httpx
import pytest

from shopr1_client import AsyncClient, Client, TransportError
from shopr1_client.grouping import Rollout
from shopr1_client.trainers.service import Service
from shopr1_client.wire import Group, ScoreRequest
from tests.support.http import TERMINATE, WAIT_S, answer, served


class Proxy:
    """Forwards requests to a service, and closes each connection instead of an answer after so many.

    Attributes:
        num_answers: answers on each connection.
        requests: methods and paths of all that have arrived.
    """

    def __init__(self, service_url: str, *, by_reset: bool) -> None:
        self.service_url = service_url
        self.by_reset = by_reset
        self.num_answers = 1
        self.requests: list[tuple[str, str]] = []
        self.url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator["Proxy"]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            num_answered = 0

            def do_GET(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.requests.append((self.command, self.path))
                if self.num_answered >= proxy.num_answers:
                    self.hang_up()
                    return
                self.num_answered += 1
                answered = httpx.request(
                    self.command,
                    proxy.service_url + self.path,
                    content=content,
                    headers={"Content-Type": "application/json"},
                    timeout=WAIT_S,
                )
                self.send_response(answered.status_code)
                self.send_header("Content-Length", str(len(answered.content)))
                self.end_headers()
                self.wfile.write(answered.content)

            do_POST = do_GET

            def hang_up(self) -> None:
                self.close_connection = True
                if proxy.by_reset:
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.close()

            def log_message(self, *_args: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = False
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_port}"
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


@pytest.fixture(scope="module")
def service_url() -> Iterator[str]:
    with served() as url:
        yield url


@pytest.fixture(params=[False, True], ids=["closed", "reset"])
def proxy(service_url: str, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    with Proxy(service_url, by_reset=request.param).running() as proxy:
        yield proxy


def request_of(num_groups: int = 1) -> ScoreRequest:
    return ScoreRequest(
        groups=[
            Group(prompt=f"page {i}", ground_truth=TERMINATE, completions=[answer()])
            for i in range(num_groups)
        ]
    )


Scored = list[float | None]
ScoreAll = Callable[[str, Sequence[ScoreRequest]], list[Scored]]


def sync_scores(url: str, requests: Sequence[ScoreRequest]) -> list[Scored]:
    with Client(url, retry_for_s=0) as client:
        return [[group.rewards[0].reward for group in client.score(each).groups] for each in requests]


def async_scores(url: str, requests: Sequence[ScoreRequest]) -> list[Scored]:
    async def run() -> list[Scored]:
        async with AsyncClient(url, retry_for_s=0) as client:
            return [
                [group.rewards[0].reward for group in (await client.score(each)).groups] for each in requests
            ]

    return asyncio.run(run())


both = pytest.mark.parametrize("score", [sync_scores, async_scores], ids=["sync", "async"])


@both
def test_a_request_whose_idle_connection_is_closed_is_sent_again(proxy: Proxy, score: ScoreAll) -> None:
    assert score(proxy.url, [request_of()] * 3) == [[0.93]] * 3
    assert len(proxy.requests) == 5  # the first, and the two others twice


@both
def test_so_is_one_of_many_connections(proxy: Proxy, score: ScoreAll) -> None:
    """Each batch has several parts; in the second, every connection that is kept fails."""
    num_groups = 200
    assert score(proxy.url, [request_of(num_groups)] * 2) == [[0.93] * num_groups] * 2


@both
def test_a_new_connection_that_is_closed_is_an_error(proxy: Proxy, score: ScoreAll) -> None:
    """The request itself may be the cause: whether to send it again is up to `retry_for_s`."""
    proxy.num_answers = 0
    with pytest.raises(TransportError):
        score(proxy.url, [request_of()])
    assert len(proxy.requests) == 1


def test_an_update_is_not_sent_again(proxy: Proxy) -> None:
    with Client(proxy.url, retry_for_s=0) as client:
        client.info()
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            client._http.post(f"{proxy.url}/policy/update", content=b"{}")
    assert proxy.requests == [("GET", "/info"), ("POST", "/policy/update")]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_shims_get_every_reward(proxy: Proxy, is_async: bool) -> None:
    """With more parts than connections, within one batch."""
    service = Service(urls=(proxy.url,))
    rollouts = [Rollout(prompt=f"page {i}", completion=answer(), ground_truth=TERMINATE) for i in range(400)]
    rewards = asyncio.run(service.score(rollouts)) if is_async else service.score_sync(rollouts)
    assert [each.reward for each in rewards] == [0.93] * 400


# --- the end of a client ----------------------------------------------------------------------------


def test_a_connection_opened_at_the_end_of_its_client_is_closed(
    service_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first error ends a request while another part is still connecting."""
    connect, opened = socket.create_connection, list[socket.socket]()
    has_opened, may_go_on = threading.Event(), threading.Event()
    client = Client(service_url, retry_for_s=0)

    def held(*args: Any, **options: Any) -> socket.socket:
        opened.append(connect(*args, **options))
        has_opened.set()
        assert may_go_on.wait(WAIT_S)
        return opened[0]

    def ask() -> None:
        with contextlib.suppress(TransportError):
            client.info()

    monkeypatch.setattr(socket, "create_connection", held)
    thread = threading.Thread(target=ask)
    thread.start()
    assert has_opened.wait(WAIT_S)
    client.close()
    may_go_on.set()
    thread.join()
    assert [each.fileno() for each in opened] == [-1]


def test_so_is_one_of_an_asynchronous_client(service_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, opened = anyio.connect_tcp, list[Any]()

    async def run() -> None:
        has_opened, may_go_on = asyncio.Event(), asyncio.Event()

        async def held(*args: Any, **options: Any) -> Any:
            opened.append(await connect(*args, **options))
            has_opened.set()
            await may_go_on.wait()
            return opened[0]

        monkeypatch.setattr(anyio, "connect_tcp", held)
        async with AsyncClient(service_url, retry_for_s=0) as client:
            asked = asyncio.create_task(client.info())
            async with asyncio.timeout(WAIT_S):
                await has_opened.wait()
        may_go_on.set()
        with pytest.raises(TransportError, match="the client has been closed"):
            await asked
        assert opened[0].extra(anyio.abc.SocketAttribute.raw_socket).fileno() == -1

    asyncio.run(run())
