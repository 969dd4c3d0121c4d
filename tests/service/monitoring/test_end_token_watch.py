"""Warnings of runs whose completions end with a token that is no end token."""

import pytest

from shopr1_client.wire import Group
from shopr1_rewards import Action, load_recipe
from shopr1_service.answers import GroupScore
from shopr1_service.core import GroupFacts, Origin, RolloutFacts, ScoredGroup
from shopr1_service.monitoring.end_token_watch import MIN_COMPLETIONS, EndTokenWatch

RECIPE = load_recipe("shop_r1")
TRUTH = Action("terminate", {})


def scored(*ends: str | None, run: str = "r") -> ScoredGroup:
    facts = GroupFacts(TRUTH, [RolloutFacts(unknown_end=end) for end in ends])
    group = Group(prompt="page", ground_truth="{}", completions=[])
    score = GroupScore(None, "0", 0, None, rewards=[], warnings=())
    return ScoredGroup(Origin("id", run), RECIPE, group, facts, score)


def test_more_than_half_of_a_runs_completions_are_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = EndTokenWatch(max_runs=4)
    watch.observe(scored(*["<e>"] * (MIN_COMPLETIONS - 1)))
    assert caplog.text == ""  # too few
    watch.observe(scored("<e>", None))
    assert "run 'r': 16 of 17 completions are invalid only because they end with '<e>'" in caplog.text
    watch.observe(scored(*["<e>"] * 5000))
    watch.observe(scored(*["<e>"] * 5000))
    assert len(caplog.records) == 1


def test_half_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    watch = EndTokenWatch(max_runs=4)
    watch.observe(scored(*["<e>", None] * MIN_COMPLETIONS))
    watch.observe(scored(*["<e>", "<f>"] * MIN_COMPLETIONS, run="two tokens"))
    assert caplog.text == ""


def test_a_change_within_a_run_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    watch = EndTokenWatch(max_runs=4)
    watch.observe(scored(*[None] * 1024))
    watch.observe(scored(*["<e>"] * MIN_COMPLETIONS))
    assert "16 of 16 completions" in caplog.text


def test_runs_are_counted_apart_and_the_oldest_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    watch = EndTokenWatch(max_runs=1)
    for _ in range(2):
        watch.observe(scored(*["<e>"] * MIN_COMPLETIONS, run="a"))
        watch.observe(scored(*[None] * MIN_COMPLETIONS, run="b"))
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == ["a", "a"]
