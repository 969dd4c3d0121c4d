"""The scorer: recipe, observers, the version in the response."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from shopr1_client import wire
from shopr1_client.errors import InvalidRequestError, PolicyVersionError
from shopr1_client.wire import ScoreRequest, ScoreResponse
from shopr1_service.core import Observer, Origin, ScoredGroup
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.scoring.recipe_book import RecipeBook
from shopr1_service.scoring.scorer import Scorer
from shopr1_service.settings import Settings
from tests.support.http import answer, group

pytestmark = pytest.mark.anyio

POLICY_MODEL = "fake"


@contextlib.contextmanager
def scorer_of(*observers: Observer) -> Iterator[Scorer]:
    engine = LocalEngine(FakePolicy(), Settings(), Metrics())
    scorer = Scorer(engine, RecipeBook("shop_r1"), Settings(), Metrics(), observers)
    try:
        yield scorer
    finally:
        scorer.close()


async def scored(scorer: Scorer, *groups: Any, **fields: Any) -> ScoreResponse:
    request = ScoreRequest.model_validate({"groups": groups, **fields})
    return await scorer.score(request, Origin("an id", "a run"))


async def test_observers_see_each_group_and_cannot_fail_a_request(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[ScoredGroup] = []

    def failing(_scored: ScoredGroup) -> None:
        raise ZeroDivisionError

    with scorer_of(failing, seen.append) as scorer:
        response = await scored(scorer, group(answer()), group(answer(), answer()))
    scores = [wire.GroupScore.model_validate(each.score, from_attributes=True) for each in seen]
    assert scores == list(response.groups)
    assert {each.origin for each in seen} == {Origin("an id", "a run")}
    assert caplog.text.count("request an id: an observer failed") == 2


async def test_the_response_names_request_recipe_and_version() -> None:
    with scorer_of() as scorer:
        response = await scored(scorer)
    assert (response.request_id, response.recipe.name) == ("an id", "shop_r1")
    assert (response.policy.model, response.policy.version, response.policy.number) == (POLICY_MODEL, "0", 0)


async def test_unknown_recipes_and_versions_are_refused() -> None:
    with scorer_of() as scorer:
        with pytest.raises(InvalidRequestError, match="no recipe 'mine'; there are: shop_r1") as caught:
            await scored(scorer, recipe="mine")
        assert caught.value.errors[0]["location"] == "recipe"
        with pytest.raises(PolicyVersionError):
            await scored(scorer, policy_version="another")


async def test_a_demanded_version_is_waited_for() -> None:
    with scorer_of() as scorer:
        demand = {"at_least": "next", "wait_s": 60.0}
        waiting = asyncio.create_task(scored(scorer, group(answer()), policy_version=demand))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        engine = scorer.engine
        assert isinstance(engine, LocalEngine)
        engine.policy.versions = engine.policy.versions.with_base("next", 0.0)
        engine.new_versions.notify()
        assert (await waiting).groups[0].policy_version == "next"
