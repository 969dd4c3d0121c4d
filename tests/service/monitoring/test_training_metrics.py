"""Metrics of trainings in `GET /metrics`. FakePolicy: 26 nats, a character is a token; the term is 0.13."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shopr1_client.wire import ScoreRequest
from shopr1_service.core import Origin, ScoredGroup
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.monitoring.training_metrics import repetition_ratio
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.scoring.recipe_book import RecipeBook
from shopr1_service.scoring.scorer import Scorer
from shopr1_service.settings import Settings
from tests.support.http import (
    CLICK,
    SEARCH,
    answer,
    group,
    metric,
    post,
    running,
    score,
    write_recipe,
)

pytestmark = pytest.mark.anyio

OTHER_CLICK = {"type": "click", "name": "x"}
SWIPE = {"type": "swipe"}


async def buckets(client: httpx.AsyncClient, name: str, **labels: str) -> dict[str, float]:
    """How many are in each bucket, those below not counted again; empty ones left out."""
    text = (await client.get("/metrics")).text
    samples = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"{name}_bucket" and labels.items() <= sample.labels.items()
    ]
    counts = [0.0, *(sample.value for sample in samples)]
    return {
        sample.labels["le"]: count - below
        for sample, below, count in zip(samples, counts, counts[1:], strict=False)
        if count > below
    }


async def runs(client: httpx.AsyncClient) -> dict[str, set[str]]:
    """The runs that each metric tells apart."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            if "run" in sample.labels:
                found.setdefault(family.name, set()).add(sample.labels["run"])
    return found


async def score_in(client: httpx.AsyncClient, run: str, *groups: object) -> None:
    response = await post(client, {"groups": groups}, **{"X-Run-ID": run})
    assert response.status_code == 200, response.text


async def scored_group(run: str = "") -> ScoredGroup:
    """A small group as observers receive it."""
    seen: list[ScoredGroup] = []
    engine = LocalEngine(FakePolicy(), Settings(), Metrics())
    scorer = Scorer(engine, RecipeBook("shop_r1"), Settings(), Metrics(), observers=[seen.append])
    try:
        request = ScoreRequest.model_validate({"groups": [group(answer(CLICK), truth=CLICK)]})
        await scorer.score(request, Origin("id", run))
    finally:
        scorer.close()
    return seen[0]


# --- rewards ----------------------------------------------------------------------------------------


async def test_rewards_are_by_the_true_type() -> None:
    async with running() as client:
        await score(client, group(answer(CLICK), answer(OTHER_CLICK), answer(), "{", truth=CLICK))
        await score(client, group(answer(), answer(CLICK)), group(answer(SEARCH), truth=SEARCH))
        sums = {
            action_type: await metric(client, "shopr1_reward_sum", run="", action_type=action_type)
            for action_type in ("click", "terminate", "type_and_submit")
        }
        clicks = await buckets(client, "shopr1_reward", action_type="click")
        others = await buckets(client, "shopr1_reward", action_type="terminate")
    # 1001.13 for the very element, 1.13 for another, 0.63 for another type, 0 for broken JSON.
    assert sums == pytest.approx(
        {"click": 1002.89, "terminate": 0.93 + 0.63, "type_and_submit": 1001.1 + 0.13}
    )
    assert clicks == {"0.0": 1, "0.75": 1, "1.5": 1, "1002.0": 1}
    assert others == {"0.75": 1, "0.99": 1}


async def test_each_step_of_the_papers_table_has_a_bucket_with_and_without_self_certainty(
    tmp_path: Path,
) -> None:
    blank = {"type": "click", "name": ""}
    alike = {"type": "click", "name": "add to cart buy later"}  # 4 of 5 words: R = 0.8
    completions = ("{", answer(), answer(blank), answer(OTHER_CLICK), answer(alike), answer(CLICK))
    truth = {"type": "click", "name": "add to cart buy now"}
    steps = {"0.0": 1, "0.75": 1, "0.99": 1, "1.5": 1, "850.0": 1, "1002.0": 1}
    without = write_recipe(tmp_path, ("alpha = 0.005", "alpha = 0.0"))
    async with running() as client, running(recipe=without) as other:
        for each in (client, other):
            await score(each, group(*completions, truth=truth))
            assert await buckets(each, "shopr1_reward", action_type="click") == steps


async def test_terms_are_by_component_and_true_type() -> None:
    async with running() as client:
        await score(client, group(answer(CLICK), answer(OTHER_CLICK), "{", truth=CLICK), group(answer()))
        sums = [
            await metric(client, "shopr1_reward_component_sum", component=component, action_type="click")
            for component in ("format", "action_type", "attribute", "value", "self_certainty")
        ]
        count = await metric(
            client, "shopr1_reward_component_count", component="value", action_type="terminate"
        )
        attributes = await buckets(
            client, "shopr1_reward_component", component="attribute", action_type="click"
        )
    assert sums == pytest.approx([1.0, 0.6, 0.4, 1000.0, 0.26])
    assert count == 1
    assert attributes == {"0.0": 1, "0.2": 2}


async def test_actions_are_counted_by_true_and_predicted_type() -> None:
    async with running() as client:
        await score(client, group(answer(CLICK), answer(), answer(SWIPE), "{", "", truth=CLICK))
        counts = {
            predicted: await metric(
                client, "shopr1_actions_total", true_type="click", predicted_type=predicted
            )
            for predicted in ("click", "terminate", "type_and_submit", "unknown", "invalid")
        }
        total = await metric(client, "shopr1_actions_total")
    assert counts == {"click": 1, "terminate": 1, "type_and_submit": 0, "unknown": 1, "invalid": 2}
    assert total == 5


async def test_counters_of_ratios_are_zero_from_a_runs_first_group_on() -> None:
    async with running() as client:
        await score_in(client, "r", group(answer(CLICK), truth=CLICK))
        families = list(text_string_to_metric_families((await client.get("/metrics")).text))
    zeros = {
        (family.name, *sorted(sample.labels.values()))
        for family in families
        for sample in family.samples
        if sample.value == 0
    }
    assert ("shopr1_actions", "invalid", "r", "shop_r1", "terminate") in zeros
    assert ("shopr1_exact_matches", "r", "shop_r1", "terminate") in zeros
    assert ("shopr1_rollouts", "out_of_memory", "r", "shop_r1", "unscorable") in zeros
    assert ("shopr1_rejected_requests", "queue_full") in zeros


async def test_unknown_ends_and_warnings() -> None:
    async with running() as client:
        await score_in(client, "r", group(answer() + "<special>", answer(), answer() + "x"), group(answer()))
        assert await metric(client, "shopr1_unknown_end_tokens_total", run="r") == 1
        assert await metric(client, "shopr1_warnings_total", run="r", code="unknown_end_token") == 1
        assert await metric(client, "shopr1_warnings_total", run="r") == 1
        assert await metric(client, "shopr1_format_errors_total", run="r", error="extra_text") == 2


async def test_exact_matches() -> None:
    async with running() as client:
        await score(client, group(answer(CLICK), answer(OTHER_CLICK), truth=CLICK), group(answer(), answer()))
        matches = [
            await metric(client, "shopr1_exact_matches_total", action_type=action_type)
            for action_type in ("click", "terminate")
        ]
    assert matches == [1, 2]


async def test_unscorable_rollouts_count_as_such_and_nowhere_else() -> None:
    async with running(FakePolicy(max_sequence_tokens=24)) as client:
        await score(client, group(answer(rationale="a" * 30), answer(rationale="a" * 40)))
        lost = await metric(client, "shopr1_rollouts_total", reason="sequence_too_long", status="unscorable")
        counts = [
            await metric(client, f"shopr1_{name}")
            for name in (
                "reward_count",
                "reward_component_count",
                "actions_total",
                "exact_matches_total",
                "self_certainty_nats_count",
                "rationale_tokens_count",
                "rationale_repetition_ratio_count",
                "measured_tokens_total",
            )
        ]
    assert lost == 2
    assert not any(counts)


# --- rationales -------------------------------------------------------------------------------------


async def test_self_certainty_is_by_the_true_type() -> None:
    async with running(FakePolicy(9.0)) as client:
        await score(client, group(answer(), answer(CLICK), "{"), group(answer(rationale=""), truth=CLICK))
        sums = [
            await metric(client, f"shopr1_self_certainty_nats_{what}", action_type="terminate")
            for what in ("sum", "count")
        ]
        clicks = await metric(client, "shopr1_self_certainty_nats_count", action_type="click")
        assert await buckets(client, "shopr1_self_certainty_nats", action_type="terminate") == {"10.0": 2}
    assert sums == [18, 2]
    assert clicks == 0  # an empty rationale has none


async def test_length_and_repetition_of_rationales() -> None:
    async with running() as client:
        # 0, 3 and 12 characters; of the 9 4-grams of the last, 4 are the first of their kind.
        rationales = ("", "abc", "abcdabcdabcd")
        await score(client, group(*(answer(rationale=rationale) for rationale in rationales), "{"))
        lengths = [await metric(client, f"shopr1_rationale_tokens_{what}") for what in ("sum", "count")]
        repeats = [
            await metric(client, f"shopr1_rationale_repetition_ratio_{what}") for what in ("sum", "count")
        ]
    assert lengths == [15, 3]
    assert repeats == pytest.approx([1 - 4 / 9, 3])


async def test_recipes_without_the_policy_have_no_metrics_of_rationales(tmp_path: Path) -> None:
    async with running(recipe=write_recipe(tmp_path, ("alpha = 0.005", "alpha = 0.0"))) as client:
        await score(client, group(answer()))
        assert await metric(client, "shopr1_reward_count") == 1
        assert await metric(client, "shopr1_rationale_tokens_count") == 0
        assert await metric(client, "shopr1_self_certainty_nats_count") == 0


@pytest.mark.parametrize(
    ("ids", "ratio"),
    [
        ([], 0),
        ([1, 1, 1], 0),
        ([1, 1, 1, 1], 0),
        ([1, 1, 1, 1, 1], 1 / 2),
        ([1] * 103, 99 / 100),
        ([1, 2, 3, 4, 5, 6], 0),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_occurred_before(ids: list[int], ratio: float) -> None:
    assert repetition_ratio(ids) == pytest.approx(ratio)


# --- runs -------------------------------------------------------------------------------------------


async def test_runs_are_distinguished_by_header_and_url() -> None:
    async with running() as client:
        await score(client, group(answer()))
        await score_in(client, "grpo-7", group(answer(), answer(), prompt="another"))
        body = json.dumps({"groups": [group(*[answer()] * 3, prompt="a third")]})
        response = await client.post(
            "/run/grpo-8/score", content=body, headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 200
        counts = {
            run: await metric(client, "shopr1_rollouts_total", run=run, status="scored")
            for run in ("", "grpo-7", "grpo-8")
        }
    assert counts == {"": 1, "grpo-7": 2, "grpo-8": 3}


async def test_the_run_that_was_silent_longest_makes_room_in_every_metric() -> None:
    async with running(FakePolicy(max_sequence_tokens=40), max_runs=2) as client:
        for i, run in enumerate(("one", "two", "one", "three")):
            completions = answer(CLICK), "{", answer(rationale="a" * 40)
            await score_in(client, run, group(*completions, truth=CLICK, prompt=str(i)))
        found = await runs(client)
        assert await metric(client, "shopr1_rollouts_total", run="one") == 6
        await score_in(client, "two", group(answer(), prompt="later"))
        assert await metric(client, "shopr1_rollouts_total", run="two") == 1  # restarts at 0
    assert len(found) == 12
    assert all(names == {"one", "three"} for names in found.values()), found


async def test_ten_thousand_made_up_runs_leave_no_more_series_than_a_few() -> None:
    scored = await scored_group()
    metrics = Metrics(max_runs=4)
    for i in range(4):
        metrics.observe(replace(scored, origin=Origin("id", f"run-{i}")))
    num_lines = metrics.render().count(b"\n")
    for i in range(10_000):
        metrics.observe(replace(scored, origin=Origin("id", f"made-up-{i}")))
    text = metrics.render()
    assert text.count(b"\n") == num_lines
    assert set(re.findall(rb'run="(.*?)"', text)) == {b"made-up-%d" % i for i in range(9996, 10_000)}


# --- when -------------------------------------------------------------------------------------------


async def test_when_a_run_was_scored_and_the_policy_loaded() -> None:
    before_s = time.time()
    async with running() as client:
        await score_in(client, "r", group(answer()))
        loaded_s = await metric(client, "shopr1_policy_loaded_timestamp_seconds")
        scored_s = await metric(client, "shopr1_last_scored_timestamp_seconds", run="r")
    assert before_s - 1 < loaded_s <= scored_s < time.time() + 1
