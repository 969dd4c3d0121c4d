"""Retries, failover and large requests, of both clients, against services behind real sockets."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import uvicorn

from shopr1_client import AsyncClient, Client, TransportError
from shopr1_client.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
)
from shopr1_client.wire import Group, ScoreRequest, ScoreResponse
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, TokenGroup, Unmeasurable, Version
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.http import TERMINATE, WAIT_S, answer, served

Score = Callable[..., ScoreResponse]


def with_client(urls: str | Sequence[str], request: ScoreRequest, **options: Any) -> ScoreResponse:
    with Client(urls, **options) as client:
        return client.score(request)


def with_async_client(urls: str | Sequence[str], request: ScoreRequest, **options: Any) -> ScoreResponse:
    async def run() -> ScoreResponse:
        async with AsyncClient(urls, **options) as client:
            return await client.score(request)

    return asyncio.run(run())


both = pytest.mark.parametrize("score", [with_client, with_async_client], ids=["sync", "async"])


def request_of(*prompts: str, num_completions: int = 1) -> ScoreRequest:
    completions: list[Any] = [answer(rationale="x" * (i + 1)) for i in range(num_completions)]
    return ScoreRequest(
        groups=[
            Group(id=str(i), prompt=prompt, ground_truth=TERMINATE, completions=completions)
            for i, prompt in enumerate(prompts)
        ]
    )


def rewards(response: ScoreResponse) -> list[list[float | None]]:
    return [[reward.reward for reward in group.rewards] for group in response.groups]


# --- large requests ---------------------------------------------------------------------------------


@both
def test_a_large_request_is_the_same_as_a_small_one(score: Score) -> None:
    request = request_of(*(f"prompt {i}" for i in range(100)), num_completions=5)
    with served(FakePolicy(26.0, 1.0)) as url, served(FakePolicy(26.0, 1.0)) as other:
        expected = rewards(score(url, request))
        with served(FakePolicy(26.0, 1.0), max_completions_per_group=2, max_groups=3) as small:
            assert rewards(score([url, other, small], request)) == expected
            assert rewards(score(small, request)) == expected
    # 15 characters before the rationale: certainties 26 + 15, 26 + 15.5 …, and 0.8 for the rest.
    assert expected[0] == pytest.approx([0.8 + 0.005 * (41 + i / 2) for i in range(5)])
    assert expected == [expected[0]] * 100


@both
def test_errors_of_a_large_request_name_their_place(score: Score) -> None:
    request = request_of(*(f"prompt {i}" for i in range(100)))
    bad = request.groups[77].model_copy(update={"ground_truth": {"type": "click"}})
    request = request.model_copy(update={"groups": [*request.groups[:77], bad, *request.groups[78:]]})
    with served() as url, pytest.raises(InvalidRequestError) as caught:
        score(url, request)
    assert caught.value.errors[0]["location"] == "groups[77].ground_truth.name"
    assert str(caught.value).startswith("groups[77].ground_truth.name: ")


@both
def test_an_error_does_not_wait_for_the_other_parts(score: Score) -> None:
    may_go_on, waited_too_long = threading.Event(), threading.Event()

    def hold() -> None:
        if not may_go_on.wait(WAIT_S):
            waited_too_long.set()

    request = request_of(*(f"prompt {i}" for i in range(40)))
    bad = request.groups[-1].model_copy(update={"ground_truth": {"type": "click"}})
    request = request.model_copy(update={"groups": [*request.groups[:-1], bad]})
    with served(FakePolicy(before_scoring=hold)) as url:
        try:
            with pytest.raises(InvalidRequestError):
                score(url, request)
            assert not waited_too_long.is_set()
        finally:
            may_go_on.set()


def test_progress() -> None:
    request = request_of(*(f"prompt {i}" for i in range(70)), num_completions=2)
    done: list[int] = []
    with served() as url, Client(url) as client:
        client.score(request, on_progress=done.append)

        async def run() -> None:
            async with AsyncClient(url) as client:
                await client.score(request, on_progress=done.append)

        asyncio.run(run())
    assert sorted(done) == [12, 12, 64, 64, 64, 64]


# --- servers that come and go -----------------------------------------------------------------------


class Server:
    """A service on one port that can be killed, with all that it does, and started again."""

    def __init__(self, policy: FakePolicy) -> None:
        self._policy = policy
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        app = create_app(Settings(), LocalEngine.opener(lambda: self._policy))
        config = uvicorn.Config(
            app, port=self._port, log_config=None, ws="none", lifespan="on", timeout_graceful_shutdown=0
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()

    def kill(self) -> None:
        self._server.force_exit = True
        self._server.should_exit = True
        self._thread.join()


@contextlib.contextmanager
def mortal(policy: FakePolicy) -> Iterator[Server]:
    server = Server(policy)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Counting(FakePolicy):
    """Calls back when it has been asked for so many batches."""

    def __init__(self, num_batches: int, then: Callable[[], None]) -> None:
        super().__init__(26.0, 1.0)
        self._num_left = num_batches
        self._then = then

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        self._num_left -= 1
        if self._num_left == 0:
            self._then()
        return super().certainties(groups, rules, version)


@both
def test_a_server_that_is_killed_and_started_again_loses_nothing(score: Score) -> None:
    request = request_of(*(f"prompt {i} " + "p" * 1000 for i in range(60)), num_completions=4)
    with served(FakePolicy(26.0, 1.0)) as url:
        expected = rewards(score(url, request))
    is_in_the_middle = threading.Event()
    with mortal(Counting(3, is_in_the_middle.set)) as server:

        def kill_and_restart() -> None:
            assert is_in_the_middle.wait(WAIT_S)
            server.kill()
            server.start()

        killer = threading.Thread(target=kill_and_restart)
        killer.start()
        try:
            actual = rewards(score(server.url, request, retry_for_s=WAIT_S, max_concurrency=2))
        finally:
            killer.join()  # before the server is killed for good
    assert actual == expected


@both
def test_a_failed_server_is_replaced_by_another(score: Score, caplog: pytest.LogCaptureFixture) -> None:
    request = request_of(*(f"prompt {i}" for i in range(40)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with served() as url:
        assert rewards(score([gone, url], request, retry_for_s=WAIT_S)) == [[0.93]] * 40
        reasons = [each.getMessage() for each in caplog.records if each.name == "shopr1_client.base"]
        assert all(f"POST {gone}/score: ConnectError" in reason for reason in reasons)
        assert reasons
        with pytest.raises(TransportError):
            score([gone, url], request, retry_for_s=0)


@both
def test_permanent_errors_are_not_repeated(score: Score) -> None:
    calls: list[None] = []

    class Buggy(FakePolicy):
        def certainties(
            self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
        ) -> list[list[Certainty | Unmeasurable]]:
            calls.append(None)
            raise ZeroDivisionError

    with served(Buggy()) as url, pytest.raises(InternalError):
        score(url, request_of("p"), retry_for_s=WAIT_S)
    assert len(calls) == 1


@both
def test_requests_have_the_clients_timeout(score: Score) -> None:
    may_go_on = threading.Event()

    def hold() -> None:
        assert may_go_on.wait(WAIT_S)

    with served(FakePolicy(before_scoring=hold), request_timeout_s=0.05) as url:
        try:
            # The server's own limit is shorter here: its answer is final, though the client would wait.
            with pytest.raises(DeadlineExceededError, match=r"within 0\.05 s"):
                score(url, request_of("p"), timeout_s=WAIT_S)
        finally:
            may_go_on.set()
