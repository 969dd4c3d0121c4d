"""An engine behind Ray: its answers, its refusals and its health."""

import asyncio
import pickle
import threading
from typing import cast

import pytest
import torch

from shopr1_client.errors import NotReadyError, OverloadedError, PolicyVersionError
from shopr1_client.wire_policy import VersionDemand
from shopr1_rewards import load_recipe
from shopr1_service.cluster import engine_replica as module
from shopr1_service.cluster.engine_replica import EngineFailedError, EngineReplica
from shopr1_service.cluster.messages import Declined, Route
from shopr1_service.core import (
    BatchKey,
    Certainty,
    CompletionTokens,
    FatalEngineError,
    GroupCertainties,
    PromptKey,
    Target,
    TokenGroup,
)
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.settings import Settings
from tests.support.http import WAIT_S

pytestmark = pytest.mark.anyio

BATCH_KEY = BatchKey(load_recipe("shop_r1").self_certainty)
GROUP = TokenGroup(PromptKey((1, 2, 3)), [CompletionTokens((4, 5), (0, 1))])


def replica_of(policy: FakePolicy, monkeypatch: pytest.MonkeyPatch, **settings: object) -> EngineReplica:
    monkeypatch.setattr(module, "load_policy", lambda _settings: policy)
    return EngineReplica(Settings(**settings).model_dump(), "a")  # type: ignore[arg-type]


async def test_it_computes_certainties_and_its_answers_can_be_pickled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = replica_of(FakePolicy(26.0, 1.0), monkeypatch)
    measured = await engine.compute_certainties(*pickle.loads(pickle.dumps((GROUP, BATCH_KEY, Route()))))
    sent = cast("GroupCertainties", pickle.loads(pickle.dumps(measured)))
    assert sent.values == [Certainty((26.0, 27.0))]
    assert sent.version.name == "0"
    monkeypatch.setattr(engine._engine.policy, "model", torch.nn.Linear(4, 2), raising=False)
    description = pickle.loads(pickle.dumps(await engine.describe()))
    assert description.info.model == "fake"
    assert description.codec.encode_text("ab").ids == [97, 98]
    assert description.max_weight_bytes == (4 * 2 + 2) * 8


async def test_a_refusal_is_returned_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replica_of(FakePolicy(), monkeypatch)
    key = BatchKey(BATCH_KEY.rules, Target(demand=VersionDemand(exact="7")))
    refused = await engine.compute_certainties(GROUP, key, Route())
    assert isinstance(refused, Declined)
    sent = pickle.loads(pickle.dumps(refused))
    assert sent.engine == "a"
    assert isinstance(sent.problem, PolicyVersionError)
    assert sent.problem.detail == refused.problem.detail


async def test_it_declines_groups_that_need_a_later_change(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replica_of(FakePolicy(), monkeypatch)
    refused = await engine.compute_certainties(GROUP, BATCH_KEY, Route(min_number=1))
    assert isinstance(refused, Declined)
    assert isinstance(refused.problem, NotReadyError)
    assert refused.problem.retry_after_s


async def test_its_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    is_held, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        assert may_go.wait(WAIT_S)

    engine = replica_of(FakePolicy(before_scoring=hold), monkeypatch, max_queue_tokens=1)
    first = asyncio.create_task(engine.compute_certainties(GROUP, BATCH_KEY, Route()))
    assert await asyncio.to_thread(is_held.wait, WAIT_S)
    second = asyncio.create_task(engine.compute_certainties(GROUP, BATCH_KEY, Route()))
    await asyncio.sleep(0)
    refused = await engine.compute_certainties(GROUP, BATCH_KEY, Route())
    assert isinstance(refused, OverloadedError)
    assert refused.retry_after_s is not None
    may_go.set()
    assert isinstance(await first, GroupCertainties)
    assert isinstance(await second, GroupCertainties)


async def test_it_is_healthy_as_long_as_the_engine_has_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = FakePolicy()
    engine = replica_of(policy, monkeypatch, engine_timeout_s=5.0)
    await engine.check_health()
    monkeypatch.setattr(type(policy.heartbeat), "age_s", 6.0)
    with pytest.raises(EngineFailedError, match=r"no heartbeat for 6 s; stack:[^$]*scheduler\.py"):
        await engine.check_health()


async def test_it_is_unhealthy_when_the_device_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FatalEngineError("the device has failed")

    engine = replica_of(FakePolicy(before_scoring=fail), monkeypatch)
    await engine.compute_certainties(GROUP, BATCH_KEY, Route())
    await asyncio.to_thread(
        engine._engine.scheduler._thread.join, WAIT_S
    )  # the thread reports the failure at its end
    with pytest.raises(EngineFailedError, match="the device has failed"):
        await engine.check_health()
