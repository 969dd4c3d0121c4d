"""Deadlines, clients that disconnect, and full queues: over a real socket."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.broken_connections import leaving
from tests.support.held import Held
from tests.support.http import WAIT_S, answer, group, problem, served


@pytest.fixture
def policy() -> Iterator[Held]:
    policy = Held()
    yield policy
    policy.gate.set()


def post(url: str, prompt: str, **headers: str) -> httpx.Response:
    body = {"groups": [group(answer(), prompt=prompt)]}
    return httpx.post(f"{url}/score", json=body, headers=headers, timeout=WAIT_S)


def metric(url: str, line: str) -> float:
    """The value of a sample by its name and labels; 0 where there is none."""
    text = httpx.get(f"{url}/metrics").text
    return next((float(row.split()[-1]) for row in text.splitlines() if row.startswith(f"{line} ")), 0.0)


def until(url: str, line: str, value: float) -> None:
    """Poll a metric: what it counts happens on the server's own time."""
    for _ in range(int(WAIT_S * 100)):
        if metric(url, line) == value:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"{line} is {metric(url, line)}")


WAITING = "shopr1_queue_tokens"


def test_a_deadline_is_kept_and_the_work_is_dropped(policy: Held) -> None:
    with served(policy) as url, ThreadPoolExecutor() as pool:
        running = pool.submit(post, url, "a")
        policy.has_begun.wait(WAIT_S)
        late = post(url, "b", **{"X-Request-Timeout": "0.05"})
        assert "not scored within 0.05 s" in problem(late, 504, "deadline_exceeded")["detail"]
        until(url, WAITING, 0)
        policy.gate.set()
        assert running.result().is_success
        assert post(url, "c").is_success
    assert policy.prompts == ["a", "c"]


def test_the_services_own_deadline_is_the_longest(policy: Held) -> None:
    with served(policy, request_timeout_s=0.05) as url:
        for headers in ({}, {"X-Request-Timeout": "3600"}):
            problem(post(url, "a", **headers), 504, "deadline_exceeded")


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "soon", ""])
def test_malformed_deadlines_are_refused(policy: Held, timeout: str) -> None:
    with served(policy) as url:
        body = problem(post(url, "a", **{"X-Request-Timeout": timeout}), 422, "invalid_request")
        assert body["errors"][0]["location"] == "header.X-Request-Timeout"
    assert policy.prompts == []


def test_the_work_of_a_client_that_disconnects_is_dropped(policy: Held) -> None:
    with served(policy) as url, ThreadPoolExecutor() as pool:
        running = pool.submit(post, url, "a")
        policy.has_begun.wait(WAIT_S)
        with leaving(url, "/score", {"groups": [group(answer(), prompt="b")]}):
            until(url, WAITING, len("b") + len(answer()))
        until(url, WAITING, 0)
        until(url, 'shopr1_requests_total{method="POST",route="/score",status="499"}', 1)
        policy.gate.set()
        assert running.result().is_success
    assert policy.prompts == ["a"]


def test_a_full_queue_refuses_with_retry_after(policy: Held) -> None:
    with served(policy, max_queue_tokens=150) as url, ThreadPoolExecutor() as pool:
        running = pool.submit(post, url, "a")
        policy.has_begun.wait(WAIT_S)
        waiting = pool.submit(post, url, "b")
        num_tokens = len("b") + len(answer())
        until(url, WAITING, num_tokens)
        prompt = "c" * (150 - num_tokens)
        refused = post(url, prompt)
        detail = f"{num_tokens} tokens wait, max_queue_tokens = 150"
        assert problem(refused, 429, "overloaded")["detail"] == detail
        assert int(refused.headers["Retry-After"]) >= 1
        policy.gate.set()
        assert running.result().is_success
        assert waiting.result().is_success
        assert post(url, prompt).is_success
        assert metric(url, 'shopr1_rejected_requests_total{reason="queue_full"}') == 1
