"""The state of an application: readiness, heartbeat, metrics of its engine."""

import asyncio

import pytest

from shopr1_client.errors import NotReadyError
from shopr1_service.engine.heartbeat import Heartbeat
from shopr1_service.http.state import EngineHangsError, State
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.engine_client import EngineClient, OnFatal
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.settings import Settings

pytestmark = pytest.mark.anyio


class Stopped(Heartbeat):
    """A heartbeat that stopped 1,000 s ago."""

    age_s = 1000.0


async def loaded(policy: FakePolicy, **settings: float) -> State:
    state = State(Settings.model_validate(settings))
    await state.load(LocalEngine.opener(lambda: policy), lambda error: None)
    return state


async def test_nothing_is_ready_before_the_policy_is_loaded() -> None:
    state = State(Settings())
    assert not state.is_ready
    for read in (lambda: state.scorer, lambda: state.engine, lambda: state.policy_state):
        with pytest.raises(NotReadyError, match="the policy is loading"):
            read()
    assert state.heartbeat_age_s == 0
    state.check_alive()
    assert await state.scrape_engines() == ()
    state.close()


async def test_a_loaded_policy_is_ready_until_the_state_is_drained() -> None:
    state = await loaded(FakePolicy())
    was_ready = state.is_ready
    assert was_ready
    assert state.engine is state.scorer.engine
    assert state.policy_state.current.version == "0"
    assert (state.policy_state.adapters, state.policy_state.update) == ([], None)
    assert await state.scrape_engines() is None
    state.drain()
    assert not state.is_ready
    with pytest.raises(NotReadyError, match="shutting down"):
        _ = state.engine
    assert not state.shutdown.is_set()
    state.close()


async def test_an_engine_without_a_heartbeat_is_not_alive() -> None:
    policy = FakePolicy()
    policy.heartbeat = Stopped()
    state = await loaded(policy, engine_timeout_s=999.0)
    with pytest.raises(NotReadyError, match="no heartbeat of the engine for 1000 s") as caught:
        state.check_alive()
    assert caught.value.retry_after_s
    state.close()


async def test_an_engine_that_hangs_ends_the_service(caplog: pytest.LogCaptureFixture) -> None:
    policy = FakePolicy()
    policy.heartbeat = Stopped()
    state = await loaded(policy, engine_timeout_s=0.1)
    failures: list[BaseException] = []
    await asyncio.wait_for(state.watch(failures.append), 60)
    assert [type(failure) for failure in failures] == [EngineHangsError]
    assert state.shutdown.is_set()
    assert not state.is_ready
    assert "no heartbeat of the engine for 1000 s; stack:" in caplog.text
    assert "scheduler.py" in caplog.text
    state.close()


async def test_a_fatal_error_of_the_engine_drains_the_state() -> None:
    failures: list[BaseException] = []
    state = State(Settings())
    fail: list[OnFatal] = []

    async def open_engine(settings: Settings, metrics: Metrics, on_fatal: OnFatal) -> EngineClient:
        fail.append(on_fatal)
        return LocalEngine(FakePolicy(), settings, metrics)

    await state.load(open_engine, failures.append)
    fail[0](error := ZeroDivisionError())
    assert not state.is_ready
    assert failures == [error]
    state.close()
