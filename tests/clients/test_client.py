"""The client: against a service behind a socket, and against servers that are none."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from shopr1_client import Client, ProblemError, ShopR1Error, TransportError
from shopr1_client.errors import (
    PROBLEMS,
    InternalError,
    InvalidRequestError,
    MalformedBodyError,
    NotFoundError,
    NotReadyError,
    PolicyVersionError,
    TooLargeError,
)
from shopr1_client.wire import Group, Include, ScoreRequest, Status, Text, TokenIds
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, TokenGroup, Unmeasurable, Version
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.http import CLICK, TERMINATE, WAIT_S, answer, served, serving


def request(
    *completions: str | Text | TokenIds, truth: Any = TERMINATE, prompt: str = "p", **more: Any
) -> ScoreRequest:
    group = Group(prompt=prompt, ground_truth=truth, completions=list(completions))
    return ScoreRequest(groups=[group], **more)


# --- a service --------------------------------------------------------------------------------------


def test_score() -> None:
    ids = TokenIds(token_ids=[ord(char) for char in answer(CLICK)])
    sent = request(answer(CLICK), Text(text="no"), ids, truth=CLICK, include=[Include.TOKENS])
    with served(FakePolicy(26.0)) as url, Client(url) as client:
        response = client.score(sent)
    rewards = response.groups[0].rewards
    assert [reward.reward for reward in rewards] == [1001.13, 0.0, 1001.13]
    assert [reward.status for reward in rewards] == [Status.SCORED] * 3
    assert rewards[0].details.tokens is not None
    assert [token.index for token in rewards[0].details.tokens] == [15, 16, 17, 18]
    assert (response.policy.model, response.recipe.name) == ("fake", "shop_r1")


def test_invalid_unicode_is_scored_0() -> None:
    """A policy's output may hold half a surrogate pair; its reward is 0 and not an exception."""
    with served() as url, Client(url) as client:
        [group] = client.score(request("\ud83d", answer())).groups
    assert [reward.reward for reward in group.rewards] == [0.0, 0.93]


def test_info() -> None:
    with served(max_groups=7) as url, Client(url) as client:
        info = client.info()
    assert (info.policy.model, info.limits.max_groups, info.default_recipe.name) == ("fake", 7, "shop_r1")


def test_a_path_in_the_base_url() -> None:
    with served() as url, Client(f"{url}/") as client:
        assert client.info().policy.model == "fake"


class Buggy(FakePolicy):
    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (request(recipe="nope"), InvalidRequestError),
        (request(truth={"type": "click"}), InvalidRequestError),
        (request(policy_version="9"), PolicyVersionError),
        (request(answer(), prompt="p" * 101), TooLargeError),
        (request(answer()), InternalError),
    ],
)
def test_problems_of_a_request(bad: ScoreRequest, expected: type[ProblemError]) -> None:
    service = served(Buggy(), max_request_tokens=100)
    with service as url, Client(url) as client, pytest.raises(expected) as caught:
        client.score(bad)
    assert type(caught.value) is expected
    assert caught.value.request_id
    assert caught.value.detail
    assert bool(caught.value.errors) is (expected is InvalidRequestError)


def test_wrong_fields_arrive() -> None:
    with served() as url, Client(url) as client, pytest.raises(InvalidRequestError) as caught:
        client.score(request(truth={"type": "click"}))
    [error] = caught.value.errors
    assert error["location"] == "groups[0].ground_truth.name"
    assert error["message"] in caught.value.detail


def test_a_null_in_the_ground_truth_is_sent_as_it_is() -> None:
    with served() as url, Client(url) as client, pytest.raises(InvalidRequestError) as caught:
        client.score(request(truth={"type": "click", "name": None}))
    assert "must be a string, not None" in caught.value.detail


# --- ready ------------------------------------------------------------------------------------------


class Loader:
    """Loads on request."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def __call__(self) -> FakePolicy:
        assert self.may_go_on.wait(WAIT_S)
        return FakePolicy()


@contextmanager
def loading() -> Iterator[tuple[str, Loader]]:
    load = Loader()
    with serving(create_app(Settings(), LocalEngine.opener(load))) as url:
        try:
            yield url, load
        finally:
            load.may_go_on.set()


def test_not_ready() -> None:
    with loading() as (url, _), Client(url, retry_for_s=0) as client:
        for call in (client.info, lambda: client.score(request())):
            with pytest.raises(NotReadyError) as caught:
                call()
            assert caught.value.retry_after_s == 5.0


def test_waiting_gives_up_with_the_obstacle() -> None:
    with loading() as (url, _), Client(url) as client, pytest.raises(NotReadyError, match="is loading"):
        client.wait_until_ready(timeout_s=0.0)


def test_waiting_ends_when_the_policy_is_loaded() -> None:
    with loading() as (url, load), Client(url, retry_for_s=0) as client:
        waiter = threading.Thread(target=client.wait_until_ready, args=(WAIT_S,))
        waiter.start()
        with pytest.raises(NotReadyError):
            client.info()
        assert waiter.is_alive()
        load.may_go_on.set()
        waiter.join()
        assert client.info().policy.model == "fake"


def test_waiting_for_a_service_that_is_ready() -> None:
    with served() as url, Client(url) as client:
        client.wait_until_ready(timeout_s=0.0)
        assert client.info().policy.model == "fake"


def test_waiting_does_not_hide_other_problems() -> None:
    with answering(404, b"{}") as url, Client(url) as client, pytest.raises(ProblemError) as caught:
        client.wait_until_ready(timeout_s=WAIT_S)
    assert type(caught.value) is ProblemError


# --- no answer --------------------------------------------------------------------------------------


def free_url() -> str:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(
    "url",
    [free_url(), "http://127.0.0.1:1", "no-scheme", "ftp://127.0.0.1"],
    ids=["free-port", "port-1", "no-scheme", "ftp"],
)
def test_no_answer_is_a_transport_error(url: str) -> None:
    with Client(url, retry_for_s=0) as client:
        for call in (client.info, lambda: client.score(request()), lambda: client.wait_until_ready(0.0)):
            with pytest.raises(TransportError) as caught:
                call()
            assert caught.value.__cause__ is not None
    assert str(caught.value).startswith(f"GET {url}/health/ready: ")


def test_a_reset_is_a_transport_error() -> None:
    hanging_up = answering(None, b"")
    with hanging_up as url, Client(url, retry_for_s=0) as client, pytest.raises(TransportError) as caught:
        client.info()
    assert str(caught.value).startswith(f"GET {url}/info: ")


def test_a_timeout_is_a_transport_error() -> None:
    # Somebody who takes connections and says nothing: the service itself would answer 504 in time.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            Client(url, timeout_s=0.1, retry_for_s=0) as client,
            pytest.raises(TransportError, match="Timeout"),
        ):
            client.score(request(answer()))


# --- servers that are none --------------------------------------------------------------------------


@contextmanager
def answering(status: int | None, body: bytes, headers: dict[str, str] | None = None) -> Iterator[str]:
    """The URL of a server that gives every request this answer; without a status it hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if status is None:
                return
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def caught(call: Callable[[Client], Any], status: int, body: bytes, **headers: str) -> ProblemError:
    server = answering(status, body, headers)
    with server as url, Client(url, retry_for_s=0) as client, pytest.raises(ProblemError) as error:
        call(client)
    return error.value


@pytest.mark.parametrize("problem_class", PROBLEMS, ids=lambda problem: problem.code)
def test_every_code_becomes_its_class(problem_class: type[ProblemError]) -> None:
    # The code decides, whatever the status.
    body = f'{{"code": "{problem_class.code}", "detail": "because", "request_id": "7", "errors": []}}'
    for status in (problem_class.status, 418):
        error = caught(Client.info, status, body.encode())
        assert type(error) is problem_class
        assert (error.detail, error.request_id, error.errors) == ("because", "7", [])


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"<html>Bad gateway</html>", "HTTP 502: <html>Bad gateway</html>"),
        (b"", "HTTP 502: "),
        (b"[1]", "HTTP 502: [1]"),
        (b'"text"', 'HTTP 502: "text"'),
        (b"null", "HTTP 502: null"),
        (b"\xff\xfe", "HTTP 502: "),
        (b"x" * 5000, "HTTP 502: " + "x" * 200),
        (b"[" * 100_000, "HTTP 502: " + "[" * 200),
    ],
)
def test_answers_that_are_no_problem(body: bytes, detail: str) -> None:
    error = caught(Client.info, 502, body)
    assert type(error) is ProblemError
    assert error.detail.startswith(detail)
    assert len(error.detail) <= 210


@pytest.mark.parametrize("status", [300, 302, 401, 429, 502, 504])
def test_other_statuses_are_plain_problems(status: int) -> None:
    error = caught(Client.info, status, b'{"detail": "by a proxy"}')
    assert type(error) is ProblemError
    assert error.detail == "by a proxy"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        ("5", 5.0),
        ("120", 120.0),
        ("", None),
        ("-1", None),
        ("soon", None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
        ("\xb2", None),  # a superscript two, which Python takes for a digit
    ],
)
def test_retry_after(header: str, seconds: float | None) -> None:
    headers = {"Retry-After": header}
    assert caught(Client.info, 503, b'{"code": "not_ready"}', **headers).retry_after_s == seconds
    assert caught(Client.info, 503, b"no JSON", **headers).retry_after_s == seconds


@pytest.mark.parametrize(
    ("status", "expected"), [(400, MalformedBodyError), (404, NotFoundError), (500, InternalError)]
)
def test_problems_with_a_body_of_ours(status: int, expected: type[ProblemError]) -> None:
    body = expected("because", request_id="7").to_problem()
    assert body["status"] == status
    assert type(caught(Client.info, status, str(body).replace("'", '"').encode())) is expected


@pytest.mark.parametrize("body", [b"<html>Welcome</html>", b"{}", b"[]", b'{"version": 1}', b""])
def test_a_right_answer_that_is_none_of_this_service(body: bytes) -> None:
    """As when the URL is another service's: the client's errors are all that a caller must know."""
    with answering(200, body) as url, Client(url) as client, pytest.raises(ShopR1Error):
        client.info()
