"""How a service starts, ends, and notices that its engine hangs: over a real socket."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from shopr1_service.engine.heartbeat import Heartbeat
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.policy.load_progress import LoadProgress, Step
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server import uvicorn_server as server
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.held import Held
from tests.support.http import (
    WAIT_S,
    answer,
    client_of,
    group,
    metric,
    problem,
    score,
    until_ready,
)
from tests.support.signalled import Service


@pytest.fixture
def policy() -> Iterator[Held]:
    policy = Held()
    yield policy
    policy.gate.set()


# --- starting ---------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_start_reports_its_progress() -> None:
    startup, gate = LoadProgress(), threading.Event()

    def load() -> FakePolicy:
        assert gate.wait(WAIT_S)
        return FakePolicy()

    app = create_app(Settings(), LocalEngine.opener(load), startup=startup)
    async with app.router.lifespan_context(app), client_of(app) as client:
        details = []
        for step in Step:
            startup.enter(step)
            answered = await client.get("/health/ready")
            details.append(problem(answered, 503, "not_ready")["detail"])
            assert int(answered.headers["Retry-After"]) >= 1
        refused = await client.post("/score", json={"groups": []})
        assert problem(refused, 503, "not_ready")["detail"] == details[-1]
        assert (await client.get("/health/live")).status_code == 200
        gate.set()
    starts = [detail.split(" (")[0] for detail in details]
    assert starts == [f"the policy is loading: {step}" for step in Step]
    assert "(step 2 of 4, 0 s since the start)" in details[1]


# --- an engine that hangs ---------------------------------------------------------------------------


def test_a_hanging_engine_ends_the_server(
    monkeypatch: pytest.MonkeyPatch, policy: Held, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(monkeypatch, policy, engine_timeout_s=1.0)

    def ask() -> httpx.Response:
        service.ready()
        return service.post()

    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask)
        assert server.serve(service.settings) == 1
        answered = asked.result()
        policy.gate.set()
    assert problem(answered, 503, "not_ready")["detail"] == "the service is shutting down; not scored"
    # The log has the stack of the hanging thread.
    assert "no heartbeat of the engine" in caplog.text
    assert "assert self.gate.wait(WAIT_S)" in caplog.text


@pytest.mark.anyio
async def test_a_hanging_engine_is_not_live(policy: Held) -> None:
    app = create_app(Settings(engine_timeout_s=0.2), LocalEngine.opener(lambda: policy))
    async with app.router.lifespan_context(app), client_of(app) as client:
        await until_ready(client)
        asked = asyncio.create_task(score_quietly(client))
        live = await until_not_live(client)
        policy.gate.set()
        await asked
    assert "no heartbeat of the engine for" in problem(live, 503, "not_ready")["detail"]


async def until_not_live(client: httpx.AsyncClient) -> httpx.Response:
    for _ in range(int(WAIT_S * 100)):
        if (answered := await client.get("/health/live")).status_code != 200:
            return answered
        await asyncio.sleep(0.01)
    raise AssertionError("still live")


async def score_quietly(client: httpx.AsyncClient) -> int:
    return (await client.post("/score", json={"groups": [group(answer())]})).status_code


@pytest.mark.anyio
async def test_an_idle_engine_stays_live() -> None:
    policy = FakePolicy()
    beats = [0]
    beat = policy.heartbeat.beat

    def count(*_: object) -> None:
        beats[0] += 1
        beat()

    policy.heartbeat.beat = count  # type: ignore[method-assign]
    app = create_app(Settings(), LocalEngine.opener(lambda: policy))
    async with app.router.lifespan_context(app), client_of(app) as client:
        for _ in range(int(WAIT_S * 100)):
            if beats[0] >= 3:
                break
            await asyncio.sleep(0.01)
        assert beats[0] >= 3
        assert await score(client, group(answer()))


# --- ending -----------------------------------------------------------------------------------------


def stopped(service: Service, policy: Held, then: Callable[[], None] = lambda: None) -> list[httpx.Response]:
    """The answers to a request that has begun and one that waits when SIGTERM comes to this process.

    Args:
        then: called when the service accepts no more requests.
    """

    def ask() -> list[httpx.Response]:
        first = pool.submit(service.post, "first")
        assert policy.has_begun.wait(WAIT_S)
        second = pool.submit(service.post, "second")
        until_waiting(service.url)
        service.stop()
        then()
        return [first.result(), second.result()]

    with ThreadPoolExecutor() as pool:
        return service.serve_during(ask)


def until_waiting(url: str) -> None:
    for _ in range(int(WAIT_S * 100)):
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        if any(line.startswith("shopr1_queue_tokens ") and float(line.split()[1]) > 0 for line in lines):
            return
        threading.Event().wait(0.01)
    raise AssertionError("nothing waits")


def test_running_and_queued_requests_finish_after_sigterm(
    monkeypatch: pytest.MonkeyPatch, policy: Held
) -> None:
    answered = stopped(Service(monkeypatch, policy), policy, then=policy.gate.set)
    assert [each.status_code for each in answered] == [200, 200]


def test_requests_beyond_the_grace_time_get_an_error(monkeypatch: pytest.MonkeyPatch, policy: Held) -> None:
    for each in stopped(Service(monkeypatch, policy, shutdown_grace_s=2), policy):
        assert problem(each, 503, "not_ready")["detail"] == "the service is shutting down; not scored"
        assert int(each.headers["Retry-After"]) >= 1


# --- metrics ----------------------------------------------------------------------------------------


class Silent(Heartbeat):
    """Metrics of an engine that has hung for 1,000 s."""

    age_s = 1000.0


@pytest.mark.anyio
async def test_readiness_and_heartbeat_are_metrics() -> None:
    gate, policy = threading.Event(), FakePolicy()
    policy.heartbeat = Silent()

    def load() -> FakePolicy:
        assert gate.wait(WAIT_S)
        return policy

    app = create_app(Settings(engine_timeout_s=10_000), LocalEngine.opener(load))
    async with app.router.lifespan_context(app), client_of(app) as client:
        assert await metric(client, "shopr1_ready") == 0
        assert "shopr1_queue_tokens" not in (await client.get("/metrics")).text  # there is no engine yet
        gate.set()
        await until_ready(client)
        assert await metric(client, "shopr1_ready") == 1
        assert await metric(client, "shopr1_queue_tokens") == 0
        beat_s = await metric(client, "shopr1_engine_heartbeat_timestamp_seconds")
        age_s = time.time() - beat_s
        assert 1000 <= age_s < 1000 + WAIT_S
        app.state.shopr1.drain()
        assert await metric(client, "shopr1_ready") == 0
