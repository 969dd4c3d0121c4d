"""`X-Run-ID` as the API document describes it."""

import re
from typing import Any

import pytest

from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.http import answer, group, metric, post, problem, running

DOCUMENT: dict[str, Any] = create_app(Settings(), LocalEngine.opener(FakePolicy)).openapi()
SCORING = {
    "/score",
    "/dialects/openrlhf/get_reward",
    "/dialects/slime/reward",
    "/dialects/llama_factory/v1/score/evaluation",
    "/dialects/nemo_gym/verify",
}

pytestmark = pytest.mark.anyio


def parameters(name: str = "X-Run-ID") -> dict[str, Any]:
    """The description of this header by route."""
    return {
        path: parameter
        for path, methods in DOCUMENT["paths"].items()
        for operation in methods.values()
        for parameter in operation.get("parameters", [])
        if parameter["name"] == name
    }


def test_routes_that_score_and_the_labels_accept_a_run_id() -> None:
    assert parameters().keys() == {*SCORING, "/labels"}
    assert all("X-Run-ID" in str(operation) for operation in DOCUMENT["paths"]["/labels"].values())


def test_routes_that_score_accept_a_key_of_the_request() -> None:
    assert parameters("Idempotency-Key").keys() == SCORING


@pytest.mark.parametrize("run", ["", "a", "grpo-7", "A.b_c-9", "x" * 64])
async def test_ids_that_the_document_allows_are_accepted(run: str) -> None:
    assert re.search(parameters()["/score"]["schema"]["pattern"], run)
    async with running() as client:
        response = await post(client, {"groups": [group(answer())]}, **{"X-Run-ID": run})
        assert response.status_code == 200
        assert await metric(client, "shopr1_rollouts_total", run=run) == 1


@pytest.mark.parametrize("run", ["x" * 65, "a b", "a/b", 'a"b', "a{b}"])
async def test_invalid_run_ids_are_refused(run: str) -> None:
    assert not re.search(parameters()["/score"]["schema"]["pattern"], run)
    async with running() as client:
        response = await post(client, {"groups": [group(answer())]}, **{"X-Run-ID": run})
    problem(response, 422, "invalid_request")
