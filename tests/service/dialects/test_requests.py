"""Rollouts and their labels from a trainer's request."""

from pathlib import Path

import pytest

from shopr1_service.policy.fake import FakePolicy
from tests.support.http import (
    TERMINATE,
    answer,
    metric,
    problem,
    running,
    write_recipe,
)
from tests.support.trainer_requests import OPENRLHF, openrlhf, register, send, send_ok

pytestmark = pytest.mark.anyio


async def test_a_label_names_its_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ("reward = 0.5", "reward = 0.25"))
    label = {"ground_truth": TERMINATE, "recipe": "shop_r1"}
    async with running(FakePolicy(26.0), recipe=recipe) as client:
        await register(client, ("page", label))
        sent = openrlhf(("page", answer(), label), ("page", answer(), None))
        named = await send_ok(client, OPENRLHF, sent)
        default = await send_ok(client, OPENRLHF, openrlhf(("page", answer(), TERMINATE)))
        counts = [await metric(client, "shopr1_rollouts_total", recipe=name) for name in ("shop_r1", "mine")]
        mixed = openrlhf(("page", answer(), TERMINATE), ("page", answer(), label))
        refused = problem(await send(client, OPENRLHF, mixed), 422, "invalid_request")
    assert named["rewards"] == [0.93, 0.93]
    assert default["rewards"] == [0.68]
    assert counts == [2, 1]
    assert [error["location"] for error in refused["errors"]] == ["labels[1]"]
    assert "'shop_r1', but 'mine' in labels[0]" in refused["errors"][0]["message"]
