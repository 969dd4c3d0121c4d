"""Components of a recipe other than Shop-R1: the same, in the same order, wherever a reward appears."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from shopr1_client.reward_logs import log_keys, log_values
from shopr1_client.wire import Group, ScoreResponse
from shopr1_service.cli.summary_table import summary
from shopr1_service.policy.fake import FakePolicy
from tests.support.http import CLICK, answer, group, metric, post, running, score, write_recipe
from tests.support.trainer_requests import OPENRLHF, openrlhf, send_ok

pytestmark = pytest.mark.anyio

COMPONENTS = ["self_certainty", "value", "format"]
SHOP_R1 = 'components = ["format", "action_type", "attribute", "value", "self_certainty"]'


def recipe(directory: Path, components: list[str] = COMPONENTS) -> str:
    return write_recipe(directory, (SHOP_R1, f"components = {json.dumps(components)}"))


async def test_answer(tmp_path: Path) -> None:
    async with running(FakePolicy(26.0, max_sequence_tokens=200), recipe=recipe(tmp_path)) as client:
        shown = (await client.get("/recipes/mine")).json()
        answered = await score(client, group(answer(CLICK), "{", answer(rationale="x" * 300), truth=CLICK))
    assert shown["components"] == COMPONENTS
    right, broken, too_long = answered["groups"][0]["rewards"]
    assert list(right["components"].items()) == [("self_certainty", 0.13), ("value", 1000.0), ("format", 0.5)]
    assert right["reward"] == 0.13 + 1000.0 + 0.5
    assert list(broken["components"].items()) == [(name, 0.0) for name in COMPONENTS]
    assert list(too_long["components"].items()) == [("self_certainty", None), ("value", 0.0), ("format", 0.5)]
    assert too_long["reward"] is None


async def test_client_and_its_tables(tmp_path: Path) -> None:
    sent = group(answer(CLICK), truth=CLICK)
    async with running(FakePolicy(26.0), recipe=recipe(tmp_path)) as client:
        response = await post(client, {"groups": [sent]})
    [scored] = ScoreResponse.model_validate_json(response.content).groups
    assert list(scored.rewards[0].components) == COMPONENTS
    values = log_values(scored.rewards[0])
    assert tuple(values) == log_keys(COMPONENTS)
    assert list(values.values())[:3] == [0.13, 1000.0, 0.5]
    console = Console(width=80, record=True)
    console.print(summary([Group.model_validate(sent)], [scored.rewards]))
    rows = [line.split("│") for line in console.export_text().splitlines() if "│" in line]
    assert [row[1].strip() for row in rows] == [
        "rollouts",
        "unscorable",
        *COMPONENTS,
        "reward",
        "exact match",
    ]


async def test_trainer_and_metrics(tmp_path: Path) -> None:
    async with running(FakePolicy(26.0), recipe=recipe(tmp_path)) as client:
        one = await send_ok(client, OPENRLHF, openrlhf(("page", answer(CLICK), CLICK)))
        none = await send_ok(client, OPENRLHF, openrlhf())
        sums = [
            await metric(client, "shopr1_reward_component_sum", component=name, action_type="click")
            for name in COMPONENTS
        ]
        shown = (await client.get("/metrics")).text
    assert tuple(one["extra_logs"]) == tuple(none["extra_logs"]) == log_keys(COMPONENTS)
    assert sums == [0.13, 1000.0, 0.5]
    assert 'component="action_type"' not in shown


async def test_without_self_certainty_the_policy_is_never_run(tmp_path: Path) -> None:
    calls: list[None] = []
    policy = FakePolicy(before_scoring=lambda: calls.append(None))
    async with running(policy, recipe=recipe(tmp_path, ["format", "value"])) as client:
        answered = await score(client, group(answer(CLICK), truth=CLICK))
    [reward] = answered["groups"][0]["rewards"]
    assert reward["components"] == {"format": 0.5, "value": 1000.0}
    assert reward["details"]["num_rationale_tokens"] == 0
    assert not calls


async def test_rollout_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with running(FakePolicy(26.0), recipe=recipe(tmp_path), rollout_log=log) as client:
        await score(client, group(answer(CLICK), truth=CLICK))
    [line] = [json.loads(line) for path in log.iterdir() for line in path.read_text("utf-8").splitlines()]
    assert list(line["components"]) == COMPONENTS
