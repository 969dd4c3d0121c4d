"""The queue before the engine: order, joining, dropping, surviving."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import pytest

from shopr1_rewards import load_recipe
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.engine import Certainty, MeasuredCompletion, TokenGroup, Unmeasurable
from shopr1_service.fake import FakePolicy
from shopr1_service.metrics import Metrics
from shopr1_service.scheduler import MAX_JOINED_COMPLETIONS, Scheduler

pytestmark = pytest.mark.anyio

RULES = load_recipe("shop_r1").self_certainty
WAIT_S = 30.0


class Gated(FakePolicy):
    """Notes what it is given; its first batch waits until the gate opens. Token 13 makes it fail."""

    def __init__(self) -> None:
        super().__init__(base_nats=0.0, step_nats=1.0)
        self.gate = threading.Event()
        self.has_begun = threading.Event()
        self.batches: list[tuple[list[int], int]] = []

    def certainties(self, group: TokenGroup, rules: SelfCertaintyRecipe) -> list[Certainty | Unmeasurable]:
        self.batches.append((list(group.prompt_ids), len(group.completions)))
        self.has_begun.set()
        assert self.gate.wait(WAIT_S)
        if 13 in group.prompt_ids:
            raise ZeroDivisionError("13")
        return super().certainties(group, rules)


def completions(*measured: int) -> list[MeasuredCompletion]:
    """One completion each, with this one token measured: FakePolicy gives its index as its value."""
    return [MeasuredCompletion(range(index + 1), [index]) for index in measured]


def values(measured: Sequence[Certainty | Unmeasurable]) -> list[float]:
    return [item.mean for item in measured if isinstance(item, Certainty)]


@pytest.fixture
def policy() -> Gated:
    return Gated()


@pytest.fixture
async def scheduler(policy: Gated) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(policy, Metrics())
    yield scheduler
    policy.gate.set()
    scheduler.close()


async def hold_up(scheduler: Scheduler, policy: Gated) -> "asyncio.Task[Sequence[Certainty | Unmeasurable]]":
    """Give the engine work that keeps it until the gate opens."""
    task = asyncio.create_task(scheduler.measure(TokenGroup([0], completions(0)), RULES))
    await asyncio.to_thread(policy.has_begun.wait, WAIT_S)
    return task


async def submit(
    scheduler: Scheduler, *groups: TokenGroup, rules: SelfCertaintyRecipe = RULES
) -> "list[asyncio.Task[Sequence[Certainty | Unmeasurable]]]":
    tasks = [asyncio.create_task(scheduler.measure(group, rules)) for group in groups]
    await asyncio.sleep(0)  # lets each task run up to its wait, in order
    return tasks


async def test_an_idle_engine_begins_at_once(policy: Gated, scheduler: Scheduler) -> None:
    policy.gate.set()
    assert values(await scheduler.measure(TokenGroup([1], completions(3, 5)), RULES)) == [3.0, 5.0]
    assert policy.batches == [([1], 2)]


async def test_what_waits_for_the_same_prompt_is_joined(policy: Gated, scheduler: Scheduler) -> None:
    await hold_up(scheduler, policy)
    tasks = await submit(
        scheduler,
        TokenGroup([1], completions(1)),
        TokenGroup([2], completions(2)),
        TokenGroup((1,), completions(3, 4)),
        TokenGroup([1], completions(5)),
    )
    policy.gate.set()
    # Each gets its own, in its own order …
    assert [values(await task) for task in tasks] == [[1.0], [2.0], [3.0, 4.0], [5.0]]
    # … and the oldest prompt comes first, with all that joined it.
    assert [(ids, num) for ids, num in policy.batches[1:]] == [([1], 4), ([2], 1)]


async def test_other_rules_do_not_join(policy: Gated, scheduler: Scheduler) -> None:
    await hold_up(scheduler, policy)
    others = RULES.model_copy(update={"temperature": 0.6})
    tasks = await submit(scheduler, TokenGroup([1], completions(1)))
    tasks += await submit(scheduler, TokenGroup([1], completions(2)), rules=others)
    policy.gate.set()
    await asyncio.gather(*tasks)
    assert policy.batches[1:] == [([1], 1), ([1], 1)]


async def test_a_batch_is_bounded(policy: Gated, scheduler: Scheduler) -> None:
    await hold_up(scheduler, policy)
    many = completions(*range(MAX_JOINED_COMPLETIONS - 1))
    groups = [TokenGroup([1], some) for some in (many, completions(0), completions(0))]
    tasks = await submit(scheduler, *groups)
    policy.gate.set()
    await asyncio.gather(*tasks)
    assert [num for _, num in policy.batches[1:]] == [MAX_JOINED_COMPLETIONS, 1]


async def test_a_group_beyond_the_bound_is_measured_alone(policy: Gated, scheduler: Scheduler) -> None:
    policy.gate.set()
    many = completions(*range(MAX_JOINED_COMPLETIONS + 1))
    assert len(await scheduler.measure(TokenGroup([1], many), RULES)) == len(many)


async def test_dropped_requests_cost_nothing(policy: Gated, scheduler: Scheduler) -> None:
    await hold_up(scheduler, policy)
    gone, there = await submit(scheduler, TokenGroup([1], completions(1)), TokenGroup([2], completions(2)))
    gone.cancel()
    await asyncio.sleep(0)
    policy.gate.set()
    assert values(await there) == [2.0]
    assert policy.batches[1:] == [([2], 1)]


async def test_a_failure_reaches_its_requests_and_no_other(policy: Gated, scheduler: Scheduler) -> None:
    await hold_up(scheduler, policy)
    tasks = await submit(
        scheduler,
        TokenGroup([13], completions(1)),
        TokenGroup([2], completions(2)),
        TokenGroup([13], completions(3)),
    )
    policy.gate.set()
    first, second, third = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(third, ZeroDivisionError)
    assert not isinstance(second, BaseException)
    assert values(second) == [2.0]


async def test_a_policy_that_measures_too_few_is_an_error_and_no_end(
    policy: Gated, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.gate.set()
    with monkeypatch.context() as patch:
        patch.setattr(policy, "certainties", lambda _group, _rules: [Certainty((1.0,))])
        with pytest.raises(RuntimeError, match="measured 1 of 2 completions"):
            await scheduler.measure(TokenGroup([1], completions(1, 2)), RULES)
    assert values(await scheduler.measure(TokenGroup([1], completions(1, 2)), RULES)) == [1.0, 2.0]


async def test_nothing_to_measure_asks_nobody(policy: Gated, scheduler: Scheduler) -> None:
    assert await scheduler.measure(TokenGroup([1], []), RULES) == []
    assert policy.batches == []


async def test_closing_cancels_what_waits_and_finishes_what_runs(policy: Gated, scheduler: Scheduler) -> None:
    running = await hold_up(scheduler, policy)
    [waiting] = await submit(scheduler, TokenGroup([1], completions(1)))
    scheduler.close()
    policy.gate.set()
    assert values(await running) == [0.0]
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(RuntimeError, match="closed"):
        await scheduler.measure(TokenGroup([1], completions(1)), RULES)
