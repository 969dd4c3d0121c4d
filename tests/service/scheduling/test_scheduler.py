"""The engine's thread: merging, dropping, refusing, surviving errors, and failing."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from shopr1_client.errors import InvalidRequestError, NotReadyError, OverloadedError, PolicyVersionError
from shopr1_client.wire_policy import VersionDemand
from shopr1_rewards import load_recipe
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import (
    BatchKey,
    Certainty,
    CompletionTokens,
    FatalEngineError,
    GroupCertainties,
    PromptKey,
    Target,
    TokenGroup,
    Unmeasurable,
    Version,
)
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.scheduler import Scheduler, TokenRate

pytestmark = pytest.mark.anyio

RULES = load_recipe("shop_r1").self_certainty
BATCH_KEY = BatchKey(RULES)
WAIT_S = 30.0
MAX_QUEUE_TOKENS = 100

Task = asyncio.Task[list[GroupCertainties]]


class Gated(FakePolicy):
    """Records its batches; the first waits until the gate opens. Token 13 makes a batch fail, token 666 the
    engine."""

    def __init__(self) -> None:
        super().__init__(base_nats=0.0, step_nats=1.0)
        self.gate = threading.Event()
        self.has_started = threading.Event()
        self.batches: list[list[tuple[list[int], int]]] = []

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        self.batches.append([(list(group.prompt_ids), len(group.completions)) for group in groups])
        self.has_started.set()
        assert self.gate.wait(WAIT_S)
        tokens = {token_id for group in groups for token_id in group.prompt_ids}
        if 13 in tokens:
            raise ZeroDivisionError("13")
        if 666 in tokens:
            raise FatalEngineError("an illegal memory access")
        return super().certainties(groups, rules, version)


def completions(*measured: int) -> list[CompletionTokens]:
    """One completion each, with this one measured token: its index is the value of FakePolicy."""
    return [CompletionTokens(range(index + 1), [index]) for index in measured]


def group_of(prompt_ids: Sequence[int], *indices: int) -> TokenGroup:
    """A prompt, and completions of which these tokens are scored."""
    return TokenGroup(PromptKey(prompt_ids), completions(*indices))


def values(measured: Sequence[GroupCertainties]) -> list[list[float]]:
    return [[item.mean for item in group.values if isinstance(item, Certainty)] for group in measured]


@pytest.fixture
def policy() -> Gated:
    return Gated()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def failures() -> list[BaseException]:
    return []


@pytest.fixture
async def scheduler(
    policy: Gated, metrics: Metrics, failures: list[BaseException]
) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(policy, metrics, max_queue_tokens=MAX_QUEUE_TOKENS, on_fatal=failures.append)
    yield scheduler
    policy.gate.set()
    scheduler.close()


async def block(scheduler: Scheduler, policy: Gated, token_id: int = 0) -> Task:
    """Block the engine until the gate opens."""
    task = asyncio.create_task(scheduler.compute_certainties([group_of([token_id], 0)], BATCH_KEY))
    await asyncio.to_thread(policy.has_started.wait, WAIT_S)
    return task


async def submit(scheduler: Scheduler, *groups: TokenGroup, rules: SelfCertaintyRecipe = RULES) -> list[Task]:
    """A request for each group."""
    tasks = [asyncio.create_task(scheduler.compute_certainties([group], BatchKey(rules))) for group in groups]
    await asyncio.sleep(0)  # lets each task run until it waits, in order
    return tasks


async def ended(scheduler: Scheduler) -> None:
    """Wait for the end of the engine's thread, which reports a fatal error last."""
    await asyncio.to_thread(scheduler._thread.join, WAIT_S)


def gauge(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(name)


async def test_an_idle_engine_starts_at_once(policy: Gated, scheduler: Scheduler) -> None:
    policy.gate.set()
    assert values(await scheduler.compute_certainties([group_of([1], 3, 5)], BATCH_KEY)) == [[3.0, 5.0]]
    assert policy.batches == [[([1], 2)]]


async def test_queued_groups_with_the_same_prompt_are_merged(policy: Gated, scheduler: Scheduler) -> None:
    await block(scheduler, policy)
    tasks = await submit(
        scheduler,
        group_of([1], 1),
        group_of([2], 2),
        group_of((1,), 3, 4),
        group_of([1], 5),
    )
    policy.gate.set()
    # Each request gets its own values, in its own order …
    assert [values(await task) for task in tasks] == [[[1.0]], [[2.0]], [[3.0, 4.0]], [[5.0]]]
    # … and the oldest prompt is first, with all its groups. The other one is short enough for the batch.
    assert policy.batches[1:] == [[([1], 4), ([2], 1)]]


async def test_the_groups_of_a_request_share_a_batch(policy: Gated, scheduler: Scheduler) -> None:
    policy.gate.set()
    groups = [
        group_of([1], 1),
        group_of([2]),
        group_of([3], 3, 4),
    ]
    assert values(await scheduler.compute_certainties(groups, BATCH_KEY)) == [[1.0], [], [3.0, 4.0]]
    assert policy.batches == [[([1], 1), ([3], 2)]]


async def test_deterministic_groups_are_computed_alone(policy: Gated, metrics: Metrics) -> None:
    scheduler = Scheduler(policy, metrics, max_queue_tokens=MAX_QUEUE_TOKENS, is_deterministic=True)
    await block(scheduler, policy)
    groups = [
        group_of([1], 1),
        group_of([1], 2),
        group_of([2], 3),
    ]
    tasks = await submit(scheduler, *groups)
    policy.gate.set()
    assert [values(await task) for task in tasks] == [[[1.0]], [[2.0]], [[3.0]]]
    assert policy.batches[1:] == [[([1], 1)], [([1], 1)], [([2], 1)]]
    scheduler.close()


async def test_short_groups_overtake_a_long_one_for_a_limited_time(
    policy: Gated, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group's rank is its arrival plus the time it takes, here a second a token."""
    now_s = 100.0
    monkeypatch.setattr("shopr1_service.scheduling.scheduler.time.perf_counter", lambda: now_s)
    monkeypatch.setattr("shopr1_service.scheduling.request_queue.MAX_BATCH_TOKENS", 0)
    monkeypatch.setattr(TokenRate, "seconds", lambda _self, num_tokens: float(num_tokens))
    scheduler = Scheduler(policy, metrics, max_queue_tokens=10**6)
    await block(scheduler, policy)
    tasks = await submit(scheduler, group_of([1] * 50, 0))  # due at 151
    for number, at_s in enumerate((101.0, 130.0, 148.0, 200.0), start=2):
        now_s = at_s
        tasks += await submit(scheduler, group_of([number], 0))  # due 2 s later
    policy.gate.set()
    await asyncio.gather(*tasks)
    assert [batch[0][0][0] for batch in policy.batches[1:]] == [2, 3, 4, 1, 5]
    scheduler.close()


async def test_cancelled_requests_are_not_computed(
    policy: Gated, scheduler: Scheduler, metrics: Metrics
) -> None:
    await block(scheduler, policy)
    gone, there = await submit(scheduler, group_of([1], 1), group_of([2], 2))
    assert gauge(metrics, "shopr1_queue_tokens") == 3 + 4
    gone.cancel()
    await asyncio.wait([gone])
    assert gauge(metrics, "shopr1_queue_tokens") == 4
    policy.gate.set()
    assert values(await there) == [[2.0]]
    assert policy.batches[1:] == [[([2], 1)]]
    assert gauge(metrics, "shopr1_queue_tokens") == 0


async def test_a_request_is_queued_as_a_whole_or_refused(
    policy: Gated, scheduler: Scheduler, metrics: Metrics
) -> None:
    await block(scheduler, policy)
    [waiting] = await submit(scheduler, group_of([1] * 59, 0))  # 60 of 100
    one, other = (
        group_of([2] * 19, 0),
        group_of([3] * 20, 0),
    )
    with pytest.raises(OverloadedError, match="60 tokens wait, max_queue_tokens = 100") as caught:
        await scheduler.compute_certainties([one, other], BATCH_KEY)
    assert caught.value.retry_after_s == 1.0  # the token rate is not known yet
    assert gauge(metrics, "shopr1_queue_tokens") == 60
    assert metrics.registry.get_sample_value("shopr1_rejected_requests_total", {"reason": "queue_full"}) == 1
    # A request that fits is still queued, and a prompt that is in the queue already costs nothing.
    more = await submit(scheduler, one, group_of([1] * 59, *[0] * 20))
    scheduler_is_full = pytest.raises(OverloadedError, match="100 tokens wait")
    with scheduler_is_full:
        scheduler.refuse_if_full()
    policy.gate.set()
    await asyncio.gather(waiting, *more)
    scheduler.refuse_if_full()


async def test_an_empty_queue_takes_a_request_larger_than_its_capacity(
    policy: Gated, scheduler: Scheduler
) -> None:
    policy.gate.set()
    large = group_of([1] * (MAX_QUEUE_TOKENS + 1), 0)
    assert values(await scheduler.compute_certainties([large], BATCH_KEY)) == [[0.0]]


async def test_an_error_reaches_the_requests_of_its_batch_only(policy: Gated, scheduler: Scheduler) -> None:
    await block(scheduler, policy)
    other_rules = RULES.model_copy(update={"temperature": 0.6})
    tasks = await submit(scheduler, group_of([13], 1), group_of([13], 3))
    tasks += await submit(scheduler, group_of([2], 2), rules=other_rules)
    policy.gate.set()
    first, third, second = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(third, ZeroDivisionError)
    assert not isinstance(second, BaseException)
    assert values(second) == [[2.0]]


async def test_an_error_drops_the_queued_groups_of_the_request(policy: Gated, metrics: Metrics) -> None:
    scheduler = Scheduler(policy, metrics, max_queue_tokens=MAX_QUEUE_TOKENS, is_deterministic=True)
    policy.gate.set()
    with pytest.raises(ZeroDivisionError):
        await scheduler.compute_certainties(
            [group_of([13], 1), group_of([2] * 9, 1)],
            BATCH_KEY,
        )
    assert gauge(metrics, "shopr1_queue_tokens") == 0
    scheduler.close()


async def test_missing_results_are_an_error_that_the_thread_survives(
    policy: Gated, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.gate.set()
    group = group_of([1], 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(policy, "certainties", lambda _groups, _rules, _version: [[Certainty((1.0,))]])
        with pytest.raises(RuntimeError, match=r"measured \[1\] of \[2\] completions"):
            await scheduler.compute_certainties([group], BATCH_KEY)
    assert values(await scheduler.compute_certainties([group], BATCH_KEY)) == [[1.0, 2.0]]


async def test_a_fatal_error_rejects_all_requests(
    policy: Gated, scheduler: Scheduler, failures: list[BaseException]
) -> None:
    running = await block(scheduler, policy, token_id=666)
    [waiting, gone] = await submit(scheduler, *(group_of([i], 1) for i in (1, 2)))
    gone.cancel()
    policy.gate.set()
    for task in (running, waiting):
        with pytest.raises(NotReadyError, match="the engine has failed") as caught:
            await task
        assert caught.value.retry_after_s is not None
    with pytest.raises(NotReadyError, match="the engine has failed"):
        await scheduler.compute_certainties([group_of([1], 1)], BATCH_KEY)
    await ended(scheduler)
    assert [str(failure) for failure in failures] == ["an illegal memory access"]
    assert len(policy.batches) == 1


async def test_a_group_without_completions_does_not_reach_the_policy(
    policy: Gated, scheduler: Scheduler
) -> None:
    assert await scheduler.compute_certainties([group_of([1])], BATCH_KEY) == [
        GroupCertainties([], policy.versions.base)
    ]
    assert policy.batches == []


async def test_close_cancels_queued_groups_and_finishes_running_ones(
    policy: Gated, scheduler: Scheduler
) -> None:
    running = await block(scheduler, policy)
    [waiting] = await submit(scheduler, group_of([1], 1))
    scheduler.close()
    policy.gate.set()
    assert values(await running) == [[0.0]]
    with pytest.raises(asyncio.CancelledError):
        await waiting
    for group in (group_of([1], 1), group_of([1])):
        with pytest.raises(NotReadyError, match="shutting down"):
            await scheduler.compute_certainties([group], BATCH_KEY)


# --- tasks ------------------------------------------------------------------------------------------


async def tasks_of(scheduler: Scheduler, *works: Callable[[], Any]) -> list["asyncio.Task[Any]"]:
    """Tasks that are queued in this order."""
    tasks = [asyncio.create_task(scheduler.between_batches(work)) for work in works]
    await asyncio.sleep(0)
    return tasks


async def test_a_task_runs_between_two_batches(policy: Gated, scheduler: Scheduler) -> None:
    running = await block(scheduler, policy)
    waiting = await submit(scheduler, group_of([1], 1))
    seen: list[Any] = []

    def look(name: str) -> Callable[[], str]:
        def work() -> str:
            seen.append((len(policy.batches), threading.current_thread().name))
            return name

        return work

    tasks = await tasks_of(scheduler, look("first"), look("second"))
    assert seen == []  # not during a batch
    policy.gate.set()
    assert [await task for task in tasks] == ["first", "second"]
    assert seen == [(1, "engine"), (1, "engine")]  # and before the queued one
    assert values(await running) == [[0.0]]
    assert values(await waiting[0]) == [[1.0]]


async def test_an_idle_engine_runs_a_task_at_once(scheduler: Scheduler) -> None:
    assert await scheduler.between_batches(lambda: 7) == 7


@pytest.mark.parametrize("error", [ZeroDivisionError("0"), SystemExit(3), InvalidRequestError("no")])
async def test_errors_of_a_task_reach_its_caller(
    policy: Gated, scheduler: Scheduler, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    outcome: list[BaseException] = []
    try:
        await scheduler.between_batches(fail)
    except BaseException as caught:  # of any class
        outcome.append(caught)
    assert outcome == [error]
    policy.gate.set()
    assert values(await scheduler.compute_certainties([group_of([1], 1)], BATCH_KEY)) == [[1.0]]


async def test_a_task_runs_even_if_its_caller_is_cancelled(policy: Gated, scheduler: Scheduler) -> None:
    await block(scheduler, policy)
    is_done: list[bool] = []
    [gone] = await tasks_of(scheduler, lambda: is_done.append(True))
    gone.cancel()
    await asyncio.wait([gone])
    policy.gate.set()
    await scheduler.between_batches(lambda: None)
    assert is_done == [True]


async def test_a_fatal_error_of_a_task(
    policy: Gated, scheduler: Scheduler, failures: list[BaseException]
) -> None:
    running = await block(scheduler, policy)
    [waiting] = await submit(scheduler, group_of([1], 1))

    def fail() -> None:
        raise FatalEngineError("no rollback")

    tasks = await tasks_of(scheduler, fail, lambda: policy.batches.clear())
    policy.gate.set()
    assert values(await running) == [[0.0]]
    for task in (waiting, *tasks):
        with pytest.raises(NotReadyError, match="the engine has failed") as caught:
            await task
        assert caught.value.retry_after_s is not None
    with pytest.raises(NotReadyError, match="the engine has failed"):
        await scheduler.between_batches(lambda: None)
    await ended(scheduler)
    assert [str(failure) for failure in failures] == ["no rollback"]
    assert len(policy.batches) == 1  # neither the batch nor the second task has started


async def test_close_rejects_tasks(policy: Gated, scheduler: Scheduler) -> None:
    await block(scheduler, policy)
    is_done: list[bool] = []
    [waiting] = await tasks_of(scheduler, lambda: is_done.append(True))
    scheduler.close()
    policy.gate.set()
    with pytest.raises(NotReadyError, match="shutting down"):
        await waiting
    with pytest.raises(NotReadyError, match="shutting down"):
        await scheduler.between_batches(lambda: is_done.append(True))
    assert is_done == []


# --- versions ---------------------------------------------------------------------------------------


def targeting(adapter: str | None = None, **demand: Any) -> BatchKey:
    return BatchKey(RULES, Target(adapter, VersionDemand(**demand) if demand else None))


def scoring(scheduler: Scheduler, token_id: int, key: BatchKey) -> Task:
    return asyncio.create_task(scheduler.compute_certainties([group_of([token_id], 1)], key))


def renew(policy: Gated, name: str) -> None:
    policy.versions = policy.versions.with_base(name, 0.0)


async def test_the_target_is_resolved_when_the_batch_starts(policy: Gated, scheduler: Scheduler) -> None:
    running = await block(scheduler, policy)
    former = policy.versions.base
    waiting = [
        scoring(scheduler, i, key) for i, key in enumerate((BATCH_KEY, targeting(at_least=0)), start=1)
    ]
    await asyncio.sleep(0)
    [changed] = await tasks_of(scheduler, lambda: renew(policy, "new"))
    policy.gate.set()
    await changed
    assert [each.version for each in await running] == [former]
    for task in waiting:
        assert [each.version for each in await task] == [policy.versions.base]
    assert policy.versions.base.name == "new"


async def test_a_version_that_was_replaced_before_the_batch_starts(
    policy: Gated, scheduler: Scheduler
) -> None:
    await block(scheduler, policy)
    exact = [scoring(scheduler, 1, targeting(exact=key)) for key in ("0", 0)]
    other = scoring(scheduler, 1, BATCH_KEY)
    await asyncio.sleep(0)
    [changed] = await tasks_of(scheduler, lambda: renew(policy, "new"))
    policy.gate.set()
    await changed
    for task in exact:
        with pytest.raises(PolicyVersionError) as caught:
            await task
        assert caught.value.retry_after_s is None
    assert values(await other) == [[1.0]]
    assert len(policy.batches) == 2


async def test_an_adapter_that_was_unloaded_before_the_batch_starts(
    policy: Gated, scheduler: Scheduler
) -> None:
    added = Version("x", 1, "a")
    policy.versions = policy.versions.with_adapter(added, max_kept=1, is_default=False)
    await block(scheduler, policy)
    gone = scoring(scheduler, 1, targeting("a"))
    await asyncio.sleep(0)
    policy.versions = policy.versions.without([added])
    policy.gate.set()
    with pytest.raises(InvalidRequestError, match="no adapter 'a' is loaded"):
        await gone


async def test_different_targets_never_share_a_batch(policy: Gated, scheduler: Scheduler) -> None:
    policy.versions = policy.versions.with_adapter(Version("x", 1, "a"), max_kept=1, is_default=False)
    await block(scheduler, policy)
    keys = [
        BATCH_KEY,
        targeting("a"),
        targeting("base"),
        targeting("a", exact="x"),
        targeting(exact=0),
        targeting("a"),
    ]
    tasks = [scoring(scheduler, 1, key) for key in keys]
    await asyncio.sleep(0)
    policy.gate.set()
    measured = [(await task)[0].version.number for task in tasks]
    assert measured == [0, 1, 0, 1, 0, 1]
    # With the same prompt, only the two with the same target share a pass.
    assert policy.batches[1:] == [[([1], 1)], [([1], 2)], [([1], 1)], [([1], 1)], [([1], 1)]]


# --- token rate -------------------------------------------------------------------------------------


def test_recent_batches_have_more_weight_in_the_rate() -> None:
    rate = TokenRate()
    assert rate.seconds(1000) == 0.0
    rate.record(100, 1.0)
    assert rate.seconds(1000) == pytest.approx(10.0)
    rate.record(300, 1.0)
    # (0.9 · 100 + 300) tokens in (0.9 · 1 + 1) s
    assert rate.seconds(1000) == pytest.approx(1000 * 1.9 / 390)
