"""Groups that come in parts: measured once, dealt out rightly, and never waited for in vain."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.engine import Certainty, TokenGroup, Unmeasurable
from shopr1_service.fake import FakePolicy
from shopr1_service.versions import Version
from tests.service.http import WAIT_S, answer, group, metric, post, problem, running, score

pytestmark = pytest.mark.anyio

POLL_S = 0.001
RATIONALES = ("d", "aa", "ccc", "bbbb")
"""The longer, the surer: a rationale's certainty is 0 + 1 + … over its tokens' places, see `FakePolicy`."""


class Recording(FakePolicy):
    """Remembers what it was asked to measure, as text."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)
        self.batches: list[list[list[str]]] = []

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        self.batches.append([["".join(map(chr, c.ids)) for c in group.completions] for group in groups])
        return super().certainties(groups, rules, version)


def part(*rationales: str, size: int = 4, **more: Any) -> dict[str, Any]:
    completions = [answer(rationale=rationale) for rationale in rationales]
    return group(*completions, group_id="g", group_size=size, **more)


def nats(answered: Any, index: int = 0) -> list[float]:
    return [reward["details"]["self_certainty_nats"] for reward in answered["groups"][index]["rewards"]]


def expected_nats(*rationales: str) -> list[float]:
    """A rationale begins at character 15: the mean of 15, 16, …"""
    return [15 + (len(rationale) - 1) / 2 for rationale in rationales]


async def waiting(client: httpx.AsyncClient, num_parts: int) -> None:
    """Returns once so many parts wait."""
    for _ in range(int(WAIT_S / POLL_S)):
        if await metric(client, "shopr1_waiting_parts") == num_parts:
            return
        await asyncio.sleep(POLL_S)
    raise AssertionError(f"{num_parts} parts do not come to wait")


async def test_the_parts_of_a_group_are_measured_as_one_in_an_order_of_their_own() -> None:
    policy = Recording()
    async with running(policy, group_wait_s=WAIT_S) as client:
        first, second = await asyncio.gather(
            score(client, part("d", "aa")), score(client, part("ccc", "bbbb"))
        )
        assert policy.batches == [[sorted(answer(rationale=rationale) for rationale in RATIONALES)]]
        assert nats(first) == expected_nats("d", "aa")
        assert nats(second) == expected_nats("ccc", "bbbb")
        assert await metric(client, "shopr1_gathered_groups_total", outcome="complete") == 1


async def test_what_is_there_in_time_is_measured() -> None:
    policy = Recording()
    async with running(policy, group_wait_s=0) as client:
        assert nats(await score(client, part("d", "aa"))) == expected_nats("d", "aa")
        assert nats(await score(client, part("ccc", "bbbb"))) == expected_nats("ccc", "bbbb")
        assert len(policy.batches) == 2
        assert await metric(client, "shopr1_gathered_groups_total", outcome="incomplete") == 2


async def test_the_next_group_may_have_the_same_id() -> None:
    policy = Recording()
    async with running(policy, group_wait_s=WAIT_S) as client:
        for rationales in (["x", "y"], ["xx", "yyy"]):
            answers = await asyncio.gather(*(score(client, part(r, size=2)) for r in rationales))
            assert [nats(each) for each in answers] == [expected_nats(r) for r in rationales]
        assert len(policy.batches) == 2


async def test_equal_parts_are_two() -> None:
    """Policies repeat themselves: a part is no repetition of its sibling."""
    policy = Recording()
    async with running(policy, group_wait_s=WAIT_S) as client:
        answers = await asyncio.gather(*(score(client, part("aa", size=2)) for _ in range(2)))
        assert await metric(client, "shopr1_gathered_groups_total", outcome="complete") == 1
    assert [nats(each) for each in answers] == [expected_nats("aa")] * 2
    assert policy.batches == [[[answer(rationale="aa")] * 2]]


async def test_rollouts_without_anything_to_measure_count() -> None:
    policy = Recording()
    async with running(policy, group_wait_s=WAIT_S) as client:
        broken = group("no JSON", group_id="g", group_size=2)
        bad, good = await asyncio.gather(score(client, broken), score(client, part("aa", size=2)))
    assert bad["groups"][0]["rewards"][0]["reward"] == 0
    assert nats(good) == expected_nats("aa")
    assert policy.batches == [[[answer(rationale="aa")]]]


async def test_whole_groups_and_parts_in_one_request() -> None:
    async with running(Recording(), group_wait_s=WAIT_S) as client:
        whole = group(answer(rationale="zzzzz"))
        request = score(client, part("d", size=2), whole, part("ccc", size=3, prompt="other"))
        rest = score(client, part("aa", size=2), part("e", "ff", size=3, prompt="other"))
        first, second = await asyncio.gather(request, rest)
    assert [nats(first, i) for i in range(3)] == [expected_nats(r) for r in ("d", "zzzzz", "ccc")]
    assert [nats(second, i) for i in range(2)] == [expected_nats("aa"), expected_nats("e", "ff")]


async def test_who_has_gone_is_not_waited_for() -> None:
    policy = Recording()
    async with running(policy, group_wait_s=WAIT_S) as client:
        gone = asyncio.ensure_future(score(client, part("d", "aa")))
        await waiting(client, 1)
        gone.cancel()
        await waiting(client, 0)
        answers = await asyncio.gather(score(client, part("ccc", "bbbb")), score(client, part("e", "f")))
    assert [nats(each) for each in answers] == [expected_nats("ccc", "bbbb"), expected_nats("e", "f")]
    assert len(policy.batches) == 1


async def test_parts_with_other_prompts_are_a_mistake() -> None:
    async with running(Recording(), group_wait_s=WAIT_S) as client:
        first = asyncio.ensure_future(score(client, part("d", size=2)))
        await waiting(client, 1)
        refused = await post(client, {"groups": [group("[]"), part("aa", size=2, prompt="other")]})
        error = {"location": "groups[1].group_id", "message": "another part of group 'g' has another prompt"}
        assert problem(refused, 422, "invalid_request")["errors"] == [error]
        await score(client, part("aa", size=2))
        assert nats(await first) == expected_nats("d")


async def test_an_error_reaches_every_part() -> None:
    class Failing(FakePolicy):
        def certainties(self, groups: Any, rules: Any, version: Any = None) -> Any:
            raise RuntimeError("broken")

    async with running(Failing(), group_wait_s=WAIT_S) as client:
        answers = await asyncio.gather(*(post(client, {"groups": [part(r, size=2)]}) for r in ("d", "aa")))
    for each in answers:
        problem(each, 500, "internal")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_id": "g"}, "group_id and group_size need each other"),
        ({"group_size": 2}, "group_id and group_size need each other"),
        ({"group_id": "g", "group_size": 1}, "more completions than group_size"),
    ],
)
async def test_group_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    async with running() as client:
        body = problem(await post(client, {"groups": [group("[]", "[]", **fields)]}), 422, "invalid_request")
        assert body["errors"] == [{"location": "groups[0]", "message": message}]


async def test_a_group_can_not_be_larger_than_a_group() -> None:
    async with running(max_completions_per_group=3) as client:
        refused = await post(client, {"groups": [part("d", size=4)]})
        assert "groups[0] has 4 completions" in problem(refused, 413, "too_large")["detail"]
