"""NeMo Gym's statistics over rollouts."""

import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from shopr1_service.policy.fake import FakePolicy
from tests.service.dialects.test_nemo_gym import PREFIX, verify
from tests.support.http import problem, running
from tests.support.trainer_requests import MAX_TOKENS, TOO_LONG, VERIFY, send, told

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running(FakePolicy(26.0, max_sequence_tokens=MAX_TOKENS)) as client:
        yield client


async def aggregated(service: httpx.AsyncClient, *rollouts: dict[str, Any]) -> Any:
    return await told(service, f"{PREFIX}/aggregate_metrics", {"verify_responses": rollouts})


async def test_aggregate_metrics(service: httpx.AsyncClient) -> None:
    answered = await aggregated(
        service,
        {"_ng_task_index": 9, "_ng_rollout_index": 0, "reward": 2.0, "ok": True, "name": "x"},
        {"_ng_task_index": 2, "_ng_rollout_index": 0, "reward": 1, "response": {"usage": {"tokens": 5}}},
        {"_ng_task_index": 9, "_ng_rollout_index": 1, "reward": 6.0, "ok": False, "response": None},
    )
    # 1, 2, 6: mean 3, squares of the deviations 4 + 1 + 9 = 14, over n − 1 = 2.
    expected = {"mean": 3.0, "max": 6.0, "min": 1.0, "median": 2.0, "std": math.sqrt(7)}
    everything = answered["agent_metrics"]
    assert {name: everything[f"{name}/reward"] for name in expected} == pytest.approx(expected)
    assert (everything["mean/ok"], everything["mean/tokens"]) == (0.5, 5.0)
    assert {name.partition("/")[2] for name in everything} == {"reward", "ok", "tokens"}
    assert answered["key_metrics"] == {"mean/reward": 3.0, "mean/ok": 0.5, "mean/tokens": 5.0}
    second, ninth = answered["group_level_metrics"]
    assert (second["_ng_task_index"], second["mean/reward"], second["std/reward"]) == (2, 1.0, 0.0)
    assert (ninth["_ng_task_index"], ninth["mean/reward"]) == (9, 4.0)
    assert ninth["std/reward"] == pytest.approx(math.sqrt(8))


async def test_aggregate_metrics_of_answers_of_verify(service: httpx.AsyncClient) -> None:
    scored = await told(service, VERIFY, verify())
    failed = await told(service, VERIFY, verify(TOO_LONG))
    answered = await aggregated(service, scored, failed)
    assert answered["agent_metrics"]["mean/reward"] == 0.93
    assert answered["agent_metrics"]["mean/mask_sample"] == 0.0
    assert answered["agent_metrics"]["max/shopr1/unscorable"] == 0.0


@pytest.mark.parametrize("rollouts", [[], [{"_ng_failure_class": "unscorable", "reward": 0.0}]])
async def test_aggregate_metrics_of_nothing(service: httpx.AsyncClient, rollouts: Any) -> None:
    answered = await aggregated(service, *rollouts)
    assert answered == {"group_level_metrics": [], "agent_metrics": {}, "key_metrics": {}}


async def test_aggregate_metrics_of_what_is_no_measurement(service: httpx.AsyncClient) -> None:
    odd = (
        b'{"verify_responses": [{"a": NaN, "b": Infinity, "c": 1'
        + b"0" * 400
        + b', "d": 1, "_ng_task_index": "x"}]}'
    )
    answered = await told(service, f"{PREFIX}/aggregate_metrics", odd)
    assert answered["key_metrics"] == {"mean/d": 1.0}
    assert [each["_ng_task_index"] for each in answered["group_level_metrics"]] == [0]


async def test_aggregate_metrics_of_what_are_no_rollouts(service: httpx.AsyncClient) -> None:
    sent = {"verify_responses": [{}, 1]}
    refused = problem(await send(service, f"{PREFIX}/aggregate_metrics", sent), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == ["verify_responses[1]"]
