"""Properties that all dialects share."""

import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from shopr1_service.dialects import llama_factory, nemo_gym, openrlhf, slime
from shopr1_service.dialects.results import Dialect
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.http import (
    CLICK,
    TERMINATE,
    WAIT_S,
    answer,
    client_of,
    group,
    metric,
    problem,
    running,
    score,
)
from tests.support.trainer_requests import (
    AIOHTTP,
    LLAMA_FACTORY,
    OPENRLHF,
    SLIME,
    VERIFY,
    register,
    request_of,
    reward_in,
    send,
    send_ok,
)

pytestmark = pytest.mark.anyio

MODULES: dict[str, Any] = {
    OPENRLHF: openrlhf,
    SLIME: slime,
    LLAMA_FACTORY: llama_factory,
    VERIFY: nemo_gym,
}
each_dialect = pytest.mark.parametrize("path", MODULES)


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running(FakePolicy(10.0, 0.5), max_body_bytes=5000) as client:
        await register(client, ("page", CLICK))
        yield client


@each_dialect
@pytest.mark.parametrize("completion", [answer(CLICK, "why not"), answer(TERMINATE), "nonsense", "", "<end>"])
async def test_the_reward_is_that_of_score(service: httpx.AsyncClient, path: str, completion: str) -> None:
    # NeMo Gym has messages, the others templated text.
    prompt = [{"role": "user", "content": "page"}] if path == VERIFY else "page"
    scored = await score(service, group(completion, truth=CLICK, prompt=prompt))
    answered = await send_ok(service, path, request_of(path, completion, CLICK))
    assert reward_in(path, answered) == scored["groups"][0]["rewards"][0]["reward"]


@each_dialect
async def test_rollouts_count_in_the_metrics_of_the_service(path: str) -> None:
    async with running() as client:
        await register(client, ("page", TERMINATE))
        await send_ok(client, path, request_of(path))
        assert await metric(client, "shopr1_rollouts_total", status="scored") == 1
        assert await metric(client, "shopr1_requests_total", route=path, status="200") == 1


@each_dialect
@pytest.mark.parametrize("sent", [b"{", b"", b"\xff", b"[" * 100_000, b"query=1"])
async def test_a_malformed_body(path: str, sent: bytes) -> None:
    async with running() as client:
        response = await client.post(path, content=sent, headers=AIOHTTP)
    if sent:
        problem(response, 400, "malformed_body")
    else:
        problem(response, 422, "invalid_request")


@each_dialect
async def test_a_body_that_is_too_large(service: httpx.AsyncClient, path: str) -> None:
    problem(await send(service, path, request_of(path, "x" * 6000)), 413, "too_large")


@each_dialect
async def test_a_service_that_loads_its_policy(path: str) -> None:
    async with client_of(create_app(Settings(), LocalEngine.opener(FakePolicy))) as client:
        await register(client, ("page", TERMINATE))
        response = await send(client, path, request_of(path))
    problem(response, 503, "not_ready")
    assert response.headers["Retry-After"]


# --- deadlines --------------------------------------------------------------------------------------

# Timeouts of the trainers, by their sources; LLaMA-Factory and NeMo Gym itself have none.
TRAINERS_OWN_S = {OPENRLHF: 180.0, SLIME: 120.0, LLAMA_FACTORY: None, VERIFY: 60.0}


@each_dialect
def test_deadlines_are_before_the_trainers_own(path: str) -> None:
    own_s, dialect = TRAINERS_OWN_S[path], MODULES[path].DIALECT
    if own_s is None:
        assert dialect.timeout_s is None
    else:
        assert own_s - 15 < dialect.timeout_s < own_s


@pytest.fixture
async def held() -> AsyncIterator[FakePolicy]:
    """A policy that works on nothing until the test is over."""
    gate = threading.Event()
    yield FakePolicy(before_scoring=lambda: assert_opens(gate))
    gate.set()


def assert_opens(gate: threading.Event) -> None:
    assert gate.wait(WAIT_S)


@each_dialect
async def test_the_services_deadline_holds(held: FakePolicy, path: str) -> None:
    async with running(held, request_timeout_s=0.05) as client:
        await register(client, ("page", TERMINATE))
        late = problem(await send(client, path, request_of(path)), 504, "deadline_exceeded")
    assert "not scored within 0.05 s" in late["detail"]


@each_dialect
async def test_the_dialects_deadline_holds(
    held: FakePolicy, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULES[path], "DIALECT", Dialect("of a test", timeout_s=0.0625))
    async with running(held) as client:
        await register(client, ("page", TERMINATE))
        late = problem(await send(client, path, request_of(path)), 504, "deadline_exceeded")
    assert "not scored within 0.0625 s" in late["detail"]
