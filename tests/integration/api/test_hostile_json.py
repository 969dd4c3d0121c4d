"""JSON that Python or its libraries cannot write is answered as well. Found by fuzzing."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.support.http import TERMINATE, problem, running

pytestmark = pytest.mark.anyio

VERIFY = "/dialects/nemo_gym/verify"
AGGREGATE = "/dialects/nemo_gym/aggregate_metrics"
ROW = {
    "responses_create_params": {"input": "page"},
    "ground_truth": TERMINATE,
    "response": {"output": []},
}


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running() as client:
        yield client


async def post(service: httpx.AsyncClient, path: str, body: str) -> httpx.Response:
    return await service.post(path, content=body, headers={"Content-Type": "application/json"})


def row(more: str) -> str:
    return f'{json.dumps(ROW)[:-1]}, "more": {more}}}'


@pytest.mark.parametrize("more", ["NaN", "-Infinity", "1e999", '[{"a": -1e999}]'])
async def test_a_number_that_no_json_can_echo_is_refused(service: httpx.AsyncClient, more: str) -> None:
    body = problem(await post(service, VERIFY, row(more)), 422, "invalid_request")
    assert [error["location"] for error in body["errors"]] == ["body"]


@pytest.mark.parametrize("more", ['"\\ud800"', '{"\\udfff": 1}', "9" * 4000, "1e308"])
async def test_other_unusual_json_is_echoed(service: httpx.AsyncClient, more: str) -> None:
    answered = await post(service, VERIFY, row(more))
    assert answered.status_code == 200, answered.text
    assert answered.json()["more"] == json.loads(more)


async def test_any_depth_is_answered(service: httpx.AsyncClient) -> None:
    """The depth that can be read and the one that can be written differ by some levels, wherever they are."""
    statuses = [
        (await post(service, VERIFY, row("[" * depth + "]" * depth))).status_code
        for depth in range(500, 1100, 5)
    ]
    assert set(statuses) == {200, 400}
    assert statuses == sorted(statuses)


@pytest.mark.parametrize(
    ("rollout", "metrics"),
    [
        ('{"\\ud800": 1.5}', {"mean/\ud800": 1.5}),
        (f'{{"_ng_task_index": {10**100}, "reward": 2}}', {"mean/reward": 2.0}),
    ],
    ids=["half a surrogate pair", "a large integer"],
)
async def test_statistics_of_strange_rollouts(
    service: httpx.AsyncClient, rollout: str, metrics: dict[str, Any]
) -> None:
    answered = await post(service, AGGREGATE, f'{{"verify_responses": [{rollout}]}}')
    assert answered.status_code == 200, answered.text
    assert answered.json()["key_metrics"] == metrics


async def test_every_method_of_a_path_is_allowed(service: httpx.AsyncClient) -> None:
    """RFC 9110, 15.5.6. Starlette names the methods of the first route only."""
    for path, methods in {"/labels": "GET, PUT, DELETE", "/score": "POST", "/recipes/x": "GET"}.items():
        answered = await service.patch(path)
        problem(answered, 405, "method_not_allowed")
        assert answered.headers["Allow"] == methods
