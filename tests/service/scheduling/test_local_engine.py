"""The local engine: a policy and its scheduler behind the `EngineClient`."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from shopr1_client.errors import NotReadyError
from shopr1_client.wire_policy import AdapterRequest, TransferRequest, UpdateRequest
from shopr1_rewards import load_recipe
from shopr1_service.core import BatchKey, Certainty, CompletionTokens, PromptKey, TokenGroup
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.settings import Settings

pytestmark = pytest.mark.anyio

BATCH_KEY = BatchKey(load_recipe("shop_r1").self_certainty)
GROUP = TokenGroup(PromptKey([1, 2]), [CompletionTokens([3, 4], [0, 1])])
UPDATE = UpdateRequest(path="new", version="1")
ADAPTER = AdapterRequest(name="a", path="new")
TRANSFER = TransferRequest.model_construct(version="1")


@pytest.fixture
def engine() -> Iterator[LocalEngine[FakePolicy]]:
    engine = LocalEngine(FakePolicy(10.0, 0.5), Settings(), Metrics())
    yield engine
    engine.close()


async def _stream() -> AsyncIterator[bytes]:
    yield b""


async def test_it_computes_with_its_policy(engine: LocalEngine[FakePolicy]) -> None:
    engine.refuse_if_full()
    [measured] = await engine.compute_certainties([GROUP], BATCH_KEY)
    assert measured.values == [Certainty((10.0, 10.5))]
    assert measured.version == engine.versions.current
    assert (engine.info, engine.codec) == (engine.policy.info, engine.policy.codec)
    assert engine.settled_number == engine.versions.num_changes == 0
    assert 0 <= engine.heartbeat_age_s < 60
    assert "scheduler.py" in engine.stack()


async def test_its_metrics_are_those_of_the_process(engine: LocalEngine[FakePolicy]) -> None:
    assert await engine.scrape() is None


async def test_a_closed_engine_computes_nothing(engine: LocalEngine[FakePolicy]) -> None:
    engine.close()
    with pytest.raises(NotReadyError, match="shutting down"):
        await engine.compute_certainties([GROUP], BATCH_KEY)


async def test_the_event_loop_runs_while_the_policy_loads() -> None:
    is_loading, gate, threads = threading.Event(), threading.Event(), []

    def load() -> FakePolicy:
        threads.append(threading.current_thread())
        is_loading.set()
        assert gate.wait(60)
        return FakePolicy()

    opening = asyncio.ensure_future(LocalEngine.opener(load)(Settings(), Metrics(), lambda error: None))
    assert await asyncio.to_thread(is_loading.wait, 60)
    assert threads[0].daemon
    gate.set()
    engine = await opening
    assert engine.info.model == "fake"
    engine.close()


async def test_an_error_while_loading_is_raised() -> None:
    def load() -> FakePolicy:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await LocalEngine.opener(load)(Settings(), Metrics(), lambda error: None)
