"""A minute of the soak, and its judge, which must notice what is wrong. `make soak` is the long one."""

import asyncio
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.ops.soak.__main__ import settings, soak
from tests.integration.ops.soak.history import History, Loaded
from tests.integration.ops.soak.judge import Judge, Sent, Window
from tests.integration.ops.soak.material import (
    ALPHA,
    COMPLETIONS,
    PROMPTS,
    TRUTHS,
    Content,
    rule_terms,
    write_policies,
)
from tests.support.models import one_thread
from tests.support.process import EMBEDDED, process

SOAK_S = 60 * float(os.environ.get("SOAK_MINUTES", "1"))
pytestmark = pytest.mark.timeout(int(SOAK_S) + 900)

SENT = Sent(PROMPTS[2], TRUTHS[0], COMPLETIONS[:3])
WINDOW = Window(1, 1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_no_reward_is_wrong_and_none_is_lost(tmp_path: Path) -> None:
    write_policies(tmp_path)
    with process(*EMBEDDED, **settings(tmp_path)) as service:
        report = asyncio.run(soak(service, tmp_path, SOAK_S, seed=1))
    print("", *report.lines(), sep="\n")
    assert report.is_good, report.lines()
    assert report.changer.num_changes > 0
    assert len(report.traffic.num_requests) > 10


# --- the judge --------------------------------------------------------------------------------------


@pytest.fixture
def judge() -> Judge:
    """A judge that has seen B replace A."""
    history = History()
    history.begin(Loaded(base=1), Content("B"))
    history.num_done = 1
    return Judge(history)


def response(judge: Judge, number: int) -> dict[str, Any]:
    """The right response of a version."""
    rewards = []
    for each in SENT.completions:
        terms = rule_terms(each, SENT.truth)
        nats = judge.truth.mean(judge.history.contents[number], SENT.prompt, each)
        terms["self_certainty"] = ALPHA * (nats or 0.0)
        details = {"self_certainty_nats": nats, "tokens": None}
        scored = {"status": "scored", "reason": None, "components": terms, "details": details}
        rewards.append({"reward": sum(terms.values()), **scored})
    name = f"v{number}" if number else "0"
    group = {"policy_number": number, "policy_version": name, "rewards": rewards}
    return {"policy": {"number": number}, "groups": [group]}


def test_a_right_response_is_right(judge: Judge) -> None:
    judge.check_response([SENT], {}, WINDOW, response(judge, 1))
    assert (judge.num_right, dict(judge.kinds_of_failure)) == (len(SENT.completions), {})


def test_a_replaced_version_is_wrong(judge: Judge) -> None:
    judge.check_response([SENT], {}, WINDOW, response(judge, 0))
    assert set(judge.kinds_of_failure) == {"wrong"}


def test_numbers_of_another_version_are_wrong(judge: Judge) -> None:
    body = response(judge, 0)
    body["policy"]["number"] = body["groups"][0]["policy_number"] = 1
    body["groups"][0]["policy_version"] = "v1"
    judge.check_response([SENT], {}, WINDOW, body)
    assert set(judge.kinds_of_failure) == {"wrong"}
    assert judge.num_right == 0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a reward of 0": lambda reward: reward.update(reward=0.0),
    "a value": lambda reward: reward["components"].update(value=1.0),
    "0.001 nats": lambda reward: reward["details"].update(
        self_certainty_nats=reward["details"]["self_certainty_nats"] + 0.001
    ),
    "no reward": lambda reward: reward.update(reward=None, status="unscorable", reason="engine_failure"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_reward_is_wrong(judge: Judge, change: str) -> None:
    body = copy.deepcopy(response(judge, 1))
    CHANGES[change](body["groups"][0]["rewards"][1])
    judge.check_response([SENT], {}, WINDOW, body)
    assert (judge.num_right, dict(judge.kinds_of_failure)) == (len(SENT.completions) - 1, {"wrong": 1})


def test_a_missing_reward_is_lost(judge: Judge) -> None:
    body = response(judge, 1)
    body["groups"][0]["rewards"].pop()
    judge.check_response([SENT], {}, WINDOW, body)
    assert dict(judge.kinds_of_failure) == {"lost": 1}


def test_numbers_of_a_dialect(judge: Judge) -> None:
    rewards = response(judge, 1)["groups"][0]["rewards"]
    values, nats = (
        [each["reward"] for each in rewards],
        [each["details"]["self_certainty_nats"] for each in rewards],
    )
    judge.check_values([SENT], WINDOW, values, nats)
    assert not judge.failures
    judge.check_values([SENT], WINDOW, [0.0, *values[1:]], None)
    assert dict(judge.kinds_of_failure) == {"wrong": 1}
