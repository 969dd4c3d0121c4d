"""Requests with the same content: one computation, one response, and no wrong one. Each is counted."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from shopr1_client.wire import PolicyRef, RecipeRef, Status
from shopr1_rewards import load_recipe
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.answers import Details, GroupScore, Reward, ScoreResponse
from shopr1_service.core import Certainty, Progress, ScoredRequest, TokenGroup, Unmeasurable, Version
from shopr1_service.memory.budget import Account
from shopr1_service.memory.sizes import scored_bytes
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.request_dedup import RequestDeduplicator
from tests.support.http import answer, group, metric, post, running, score

pytestmark = pytest.mark.anyio


def result_of(name: str, num_rollouts: int, status: Status) -> ScoredRequest:
    """A result; only the name of its response, and number and status of its rewards matter here."""
    details = Details(None, None, None, False, (), (), (), {}, False, False, None, 0)
    reward = Reward(0.0, status, None, None, {}, details)
    group = GroupScore(None, "0", 0, None, rewards=[reward] * num_rollouts, warnings=())
    policy = PolicyRef(model="fake", version="0", number=0)
    response = ScoreResponse(name, RecipeRef(name="shop_r1", digest=""), policy, [group])
    return ScoredRequest(response, load_recipe("shop_r1"), [])


def name_of(result: ScoredRequest) -> str:
    return result.response.request_id


class Work:
    """Counts its starts and cancellations; ends when `may_end` is set."""

    def __init__(
        self, num_rollouts: int = 1, error: Exception | None = None, status: Status = Status.SCORED
    ) -> None:
        self.may_end = asyncio.Event()
        self.num_started = 0
        self.num_cancelled = 0
        self.num_waiting = 1
        self._num_rollouts = num_rollouts
        self._error = error
        self._status = status

    async def __call__(self, progress: Progress) -> ScoredRequest:
        self.num_started += 1
        progress.num_waiting = self.num_waiting
        number = self.num_started
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self._error is not None:
            raise self._error
        return result_of(str(number), self._num_rollouts, self._status)


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


def ask(deduplicator: RequestDeduplicator, work: Work, key: bytes = b"k") -> "asyncio.Task[ScoredRequest]":
    return asyncio.ensure_future(deduplicator.score(key, work))


async def test_duplicates_share_work_and_response() -> None:
    deduplicator, work = RequestDeduplicator(Metrics()), Work()
    tasks = [ask(deduplicator, work) for _ in range(3)]
    other = ask(deduplicator, work, b"other")
    await settle()
    assert work.num_started == 2
    work.may_end.set()
    assert {name_of(await task) for task in tasks} == {"1"}
    assert name_of(await other) == "2"
    assert name_of(await deduplicator.score(b"k", work)) == "1"  # also later
    assert work.num_started == 2


async def test_work_continues_while_one_client_waits() -> None:
    deduplicator, work = RequestDeduplicator(Metrics()), Work()
    first, second = ask(deduplicator, work), ask(deduplicator, work)
    await settle()
    first.cancel()
    await settle()
    assert work.num_cancelled == 0
    work.may_end.set()
    assert name_of(await second) == "1"
    assert first.cancelled()


async def test_work_is_cancelled_with_its_last_client_and_restarted_for_the_next() -> None:
    deduplicator, work = RequestDeduplicator(Metrics()), Work()
    tasks = [ask(deduplicator, work), ask(deduplicator, work)]
    await settle()
    for task in tasks:
        task.cancel()
    late = ask(deduplicator, work)  # arrives while the work is being cancelled
    await settle()
    assert (work.num_started, work.num_cancelled) == (2, 1)
    work.may_end.set()
    assert name_of(await late) == "2"


async def test_started_work_is_finished_for_the_next_duplicate() -> None:
    deduplicator, work = RequestDeduplicator(Metrics()), Work()
    work.num_waiting = 0
    gone = ask(deduplicator, work)
    await settle()
    gone.cancel()
    await settle()
    again = ask(deduplicator, work)
    await settle()
    assert (work.num_started, work.num_cancelled) == (1, 0)
    work.may_end.set()
    assert name_of(await again) == "1"


async def test_errors_reach_all_clients_and_are_not_kept() -> None:
    deduplicator, work = RequestDeduplicator(Metrics()), Work(error=ZeroDivisionError())
    tasks = [ask(deduplicator, work), ask(deduplicator, work)]
    work.may_end.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ZeroDivisionError] * 2
    with pytest.raises(ZeroDivisionError):
        await deduplicator.score(b"k", work)
    assert work.num_started == 2


async def test_kept_responses_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("shopr1_service.scheduling.request_dedup.time.monotonic", lambda: clock[0])
    deduplicator, work = RequestDeduplicator(Metrics()), Work()
    work.may_end.set()
    for clock[0], expected in ((100.0, "1"), (699.9, "1"), (700.0, "2")):
        assert name_of(await deduplicator.score(b"k", work)) == expected


async def test_unscorable_rollouts_are_tried_again() -> None:
    deduplicator, work = RequestDeduplicator(Metrics()), Work(status=Status.UNSCORABLE)
    work.may_end.set()
    for expected in ("1", "2"):
        assert name_of(await deduplicator.score(b"k", work)) == expected


async def test_the_memory_of_kept_results_is_bounded() -> None:
    num_bytes = scored_bytes(result_of("a", 4, Status.SCORED))
    metrics = Metrics(max_client_memory_bytes=8 * (2 * num_bytes + 1))  # an eighth is for them: two fit
    deduplicator, work = RequestDeduplicator(metrics), Work(num_rollouts=4)
    work.may_end.set()
    for key in (b"a", b"b", b"c"):
        await deduplicator.score(key, work)
    assert work.num_started == 3
    await deduplicator.score(b"b", work)
    await deduplicator.score(b"c", work)
    assert work.num_started == 3
    await deduplicator.score(b"a", work)  # was evicted by c
    assert work.num_started == 4
    assert metrics.memory.num_bytes(Account.ANSWERS) == 2 * num_bytes
    large = Work(num_rollouts=100)
    large.may_end.set()
    await deduplicator.score(b"large", large)  # would take all: it is not kept, and the others are
    assert metrics.memory.num_bytes(Account.ANSWERS) == 2 * num_bytes


async def test_kept_results_make_room_for_requests() -> None:
    num_bytes = scored_bytes(result_of("a", 1, Status.SCORED))
    metrics = Metrics(max_client_memory_bytes=80 * num_bytes)
    deduplicator, work = RequestDeduplicator(metrics), Work()
    work.may_end.set()
    for key in (b"a", b"b", b"c"):
        await deduplicator.score(key, work)
    with metrics.memory.hold(Account.REQUESTS, 79 * num_bytes):
        assert metrics.memory.num_bytes(Account.ANSWERS) == num_bytes
        await deduplicator.score(b"d", work)  # there is no room to keep it
        assert metrics.memory.num_bytes(Account.ANSWERS) == num_bytes
    await deduplicator.score(b"c", work)
    assert work.num_started == 4
    await deduplicator.score(b"a", work)
    assert work.num_started == 5


# --- over HTTP --------------------------------------------------------------------------------------


class Counting(FakePolicy):
    num_completions = 0

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        self.num_completions += sum(len(group.completions) for group in groups)
        return super().certainties(groups, rules, version)


async def test_equal_requests_are_computed_once_and_counted_each() -> None:
    policy = Counting()
    body: Any = {"groups": [group(answer(), answer(rationale="no"))]}
    async with running(policy) as client:
        first, second = [(await post(client, body)).json() for _ in range(2)]
        assert first.pop("request_id") != second.pop("request_id")
        assert first == second
        assert policy.num_completions == 2
        assert await metric(client, "shopr1_repeated_requests_total", how="answered") == 1
        assert await metric(client, "shopr1_rollouts_total") == 4
        await post(client, {**body, "recipe": "shop_r1"})  # another body
        await score(client, *body["groups"], include=["tokens"])
        await score(client, *body["groups"], include=["tokens"])  # is not kept
        assert await metric(client, "shopr1_rollouts_total") == 10
    assert policy.num_completions == 8
