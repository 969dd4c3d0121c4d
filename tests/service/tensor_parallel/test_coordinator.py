"""What several devices are told when not all of them do the same. Participants are played by the test."""

from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from shopr1_service.engine import FatalEngineError
from shopr1_service.errors import PolicyError
from shopr1_service.tensor_parallel.coordinator import Coordinator
from shopr1_service.tensor_parallel.messages import Done, Failed, Least, Outcome, Tried, Verdict

GOOD, SHORT, BROKEN = Outcome.GOOD, Outcome.OUT_OF_MEMORY, Outcome.FAILED


class Stage:
    """A coordinator, and what two participants say, one message after the other, before it asks."""

    def __init__(self, *said: Any) -> None:
        pairs = [Pipe() for _ in said]
        self.ends: list[Connection] = [theirs for _, theirs in pairs]
        self.coordinator = Coordinator([ours for ours, _ in pairs], silence_s=0.1)
        for end, messages in zip(self.ends, said, strict=True):
            for message in messages:
                end.send(message)

    def heard(self, rank: int) -> list[Any]:
        end = self.ends[rank]
        messages = []
        while end.poll():
            messages.append(end.recv())
        return messages


def test_all_get_the_task_and_the_results_come_by_rank() -> None:
    stage = Stage([Done("a")], [Done("b")])
    assert stage.coordinator.run("task") == ["a", "b"]
    assert stage.heard(0) == stage.heard(1) == ["task"]


def test_the_least_number_is_told_to_all() -> None:
    stage = Stage([Least(7), Done()], [Least(5), Done()])
    stage.coordinator.run("task")
    assert stage.heard(0) == stage.heard(1) == ["task", 5]


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [(GOOD, GOOD, Verdict.GO_ON), (SHORT, GOOD, Verdict.TRY_AGAIN), (SHORT, SHORT, Verdict.TRY_AGAIN)],
)
def test_after_a_try_all_go_on_alike(first: Outcome, second: Outcome, verdict: Verdict) -> None:
    stage = Stage([Tried(first, 8), Done()], [Tried(second, 8), Done()])
    stage.coordinator.run("task")
    assert stage.heard(0) == stage.heard(1) == ["task", verdict]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (Tried(SHORT, 8, "no memory"), Tried(SHORT, 9), "device 0 failed: no memory"),
        (Tried(GOOD, 8), Tried(SHORT, 7, "no memory"), "device 1 failed: no memory"),
        (Tried(GOOD, 8), Tried(GOOD, 9), "not done the same collectives"),
        (Tried(BROKEN, 8, "no link"), Tried(BROKEN, 8, "no link"), "device 0 failed: no link; device 1"),
        (Tried(GOOD, 8), Least(3), "do not do the same"),
        (Tried(GOOD, 8), Failed("lost", is_policy_error=False), "device 1 failed: lost"),
    ],
)
def test_devices_that_cannot_go_on_together_are_given_up(first: Any, second: Any, message: str) -> None:
    stage = Stage([first], [second])
    with pytest.raises(FatalEngineError, match=message):
        stage.coordinator.run("task")


def test_what_all_fail_with_is_told() -> None:
    for failed, error in (
        (Failed("no weights", is_policy_error=True), PolicyError),
        (Failed("no disk", is_policy_error=False), RuntimeError),
    ):
        stage = Stage([failed], [failed])
        with pytest.raises(error, match=failed.message):
            stage.coordinator.run("task")


def test_nobody_waits_for_long_for_one_that_has_failed() -> None:
    stage = Stage([Tried(SHORT, 8, "no memory")], [])
    with pytest.raises(FatalEngineError, match="device 0 failed: no memory; the other devices wait"):
        stage.coordinator.run("task")


def test_a_process_that_ends_is_noticed_while_others_work() -> None:
    stage = Stage([], [])
    stage.ends[1].close()
    with pytest.raises(FatalEngineError, match="the process of device 1 has ended"):
        stage.coordinator.run("task")
