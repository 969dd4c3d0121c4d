"""Requests that demand a version: they get it, wait for it, or fail because it is gone."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.support.http import answer, group, metric, post, problem
from tests.support.models import one_thread
from tests.support.updating import Service, changed_model, done, file_of, flaws, updatable

pytestmark = pytest.mark.anyio

LONG_S = 120.0
NEW = [file_of(changed_model(seed)) for seed in (1, 2)]
GROUP = group(answer())


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with updatable() as service:
        yield service


async def ask(service: Service, demand: Any, **headers: str) -> httpx.Response:
    return await post(service.http, {"groups": [GROUP], "policy_version": demand}, **headers)


async def number(service: Service, demand: Any) -> int:
    """Number of the version that scored."""
    return int(done(await ask(service, demand))["groups"][0]["policy_number"])


async def until_waiting(service: Service, task: "asyncio.Task[Any]") -> None:
    """A request that has been taken in, and is not answered."""
    new_versions = service.app.state.shopr1.engine.new_versions
    while not new_versions._changed._waiters:
        assert not task.done()
        await asyncio.sleep(0)


# --- without waiting --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "demand",
    [
        "b",
        {"exact": "b"},
        {"exact": 2},
        {"at_least": "b"},
        {"at_least": "a"},
        {"at_least": 1},
        {"at_least": 0},
    ],
)
async def test_loaded_versions_score(service: Service, demand: Any) -> None:
    for content, name in zip(NEW, "ab", strict=True):
        done(await service.upload(content, name))
    assert await number(service, demand) == 2


@pytest.mark.parametrize("demand", ["0", "a", {"exact": "a"}, {"exact": 0}, {"exact": 1}])
async def test_replaced_versions_are_not_worth_a_retry(service: Service, demand: Any) -> None:
    for content, name in zip(NEW, "ab", strict=True):
        done(await service.upload(content, name))
    for wait_s in (0.0, LONG_S):  # nobody waits for it either
        waiting = {**demand, "wait_s": wait_s} if isinstance(demand, dict) else demand
        refused = await ask(service, waiting)
        assert "'b' is loaded, number 2" in problem(refused, 409, "policy_version")["detail"]
        assert "Retry-After" not in refused.headers


@pytest.mark.parametrize("demand", ["a", {"exact": 1}, {"at_least": "a"}, {"at_least": 1}])
async def test_a_future_version_has_a_retry_after(service: Service, demand: Any) -> None:
    refused = await ask(service, demand)
    problem(refused, 409, "policy_version")
    assert int(refused.headers["Retry-After"]) >= 1
    done(await service.upload(NEW[0], "a"))
    assert await number(service, demand) == 1


async def test_refusals_are_counted_by_their_status(service: Service) -> None:
    num_rollouts = await metric(service.http, "shopr1_rollouts_total")
    for _ in range(2):
        problem(await ask(service, "none"), 409, "policy_version")
    assert await number(service, "0") == 0
    labels = {"route": "/score", "method": "POST"}
    assert await metric(service.http, "shopr1_requests_total", status="409", **labels) == 2
    assert await metric(service.http, "shopr1_requests_total", status="200", **labels) == 1
    # Of what was refused nothing is scored.
    assert await metric(service.http, "shopr1_rollouts_total") == num_rollouts + 1
    assert await metric(service.http, "shopr1_rejected_requests_total") == 0


# --- waiting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("demand", [{"exact": "a"}, {"exact": 1}, {"at_least": "a"}, {"at_least": 1}])
async def test_a_waiting_request_gets_the_version(service: Service, demand: dict[str, Any]) -> None:
    waiting = asyncio.create_task(number(service, {**demand, "wait_s": LONG_S}))
    await until_waiting(service, waiting)
    assert await number(service, None) == 0
    done(await service.upload(NEW[0], "a"))
    assert await waiting == 1


async def test_a_failed_update_is_not_it(service: Service) -> None:
    waiting = asyncio.create_task(number(service, {"at_least": 1, "wait_s": LONG_S}))
    await until_waiting(service, waiting)
    problem(await service.upload(NEW[0][:-1], "a"), 422, "invalid_weights")
    await until_waiting(service, waiting)
    done(await service.upload(NEW[1], "b"))
    assert await waiting == 1


async def test_a_waiting_request_fails_after_its_wait_time(service: Service) -> None:
    refused = await ask(service, {"at_least": 1, "wait_s": 0.05})
    problem(refused, 409, "policy_version")
    assert int(refused.headers["Retry-After"]) >= 1


async def test_not_beyond_the_requests_own_time(service: Service) -> None:
    refused = await ask(service, {"at_least": 1, "wait_s": LONG_S}, **{"X-Request-Timeout": "0.05"})
    problem(refused, 504, "deadline_exceeded")


async def test_two_requests_wait_for_the_same_version(service: Service) -> None:
    """They are twins; who comes when it is there is another one."""
    demand = {"at_least": 1, "wait_s": LONG_S}
    waiting = [asyncio.create_task(number(service, demand)) for _ in range(2)]
    for each in waiting:
        await until_waiting(service, each)
    done(await service.upload(NEW[0], "a"))
    assert await asyncio.gather(*waiting) == [1, 1]
    done(await service.upload(NEW[1], "b"))
    assert await number(service, demand) == 2


async def test_equal_requests_of_two_versions_are_not_the_same(service: Service) -> None:
    """Without includes answers are kept for who repeats himself: not beyond a change."""

    async def scored() -> Any:
        answered = done(await post(service.http, {"groups": [GROUP]}))["groups"][0]
        return answered["policy_number"], answered["rewards"][0]["details"]["self_certainty_nats"]

    first = await scored()
    assert await scored() == first
    done(await service.upload(NEW[0], "a"))
    second = await scored()
    assert (first[0], second[0]) == (0, 1)
    assert first[1] != second[1]


# --- malformed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("demand", "location"),
    [
        (1, "policy_version"),
        ([], "policy_version"),
        (True, "policy_version"),
        ({}, "policy_version"),
        ({"exact": "a", "at_least": "a"}, "policy_version"),
        ({"exact": None}, "policy_version"),
        ({"wait_s": 1.0}, "policy_version"),
        ({"exact": 1.5}, "policy_version.exact"),
        ({"exact": True}, "policy_version.exact"),
        ({"at_least": ["a"]}, "policy_version.at_least"),
        ({"at_least": 1, "wait_s": -1}, "policy_version.wait_s"),
        ({"at_least": 1, "wait_s": "soon"}, "policy_version.wait_s"),
        ({"at_least": 1, "wait": 1}, "policy_version.wait"),
    ],
)
async def test_malformed_demands(service: Service, demand: Any, location: str) -> None:
    assert flaws(await ask(service, demand), 422, "invalid_request").keys() == {location}


@pytest.mark.parametrize("wait_s", [b"NaN", b"Infinity", b"1e999"])
async def test_a_time_that_is_no_number(service: Service, wait_s: bytes) -> None:
    body = b'{"groups": [], "policy_version": {"at_least": 1, "wait_s": %s}}' % wait_s
    refused = await post(service.http, body)
    assert flaws(refused, 422, "invalid_request").keys() == {"policy_version.wait_s"}
