"""The synchronous client, against a service behind a socket and against servers that do not answer."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest

from shopr1_client import Client, ProblemError, TransportError
from shopr1_client.errors import (
    InternalError,
    InvalidRequestError,
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
from tests.support.canned_server import answering
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


@contextmanager
def taken_url() -> Iterator[str]:
    """A port that nobody listens on, and that no other process can take meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.mark.parametrize(
    "closed", [taken_url, lambda: nullcontext("http://127.0.0.1:1")], ids=["free-port", "port-1"]
)
def test_no_answer_is_a_transport_error(closed: Callable[[], AbstractContextManager[str]]) -> None:
    with closed() as url, Client(url, retry_for_s=0) as client:
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
