"""A batch as OpenRLHF sends it: thousands of rollouts at once, each alone, some of them tried again."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence

import httpx
import pytest

from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, TokenGroup, Unmeasurable, Version
from shopr1_service.policy.fake import FakePolicy
from tests.support.http import TERMINATE, WAIT_S, answer, metric, served
from tests.support.trainer_requests import OPENRLHF, openrlhf

pytestmark = pytest.mark.anyio

NUM_PROMPTS, NUM_COMPLETIONS = 32, 64
NUM_IMPATIENT = 40
POLL_S = 0.01


class Counting(FakePolicy):
    """Counts how often each rollout is measured. Its first batch takes until the gate opens."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)
        self.gate = threading.Event()
        self.counts: Counter[tuple[str, str]] = Counter()

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        for group in groups:
            prompt = "".join(map(chr, group.prompt_ids))
            self.counts.update((prompt, "".join(map(chr, c.ids))) for c in group.completions)
        assert self.gate.wait(WAIT_S)
        return super().certainties(groups, rules, version)


def client_of(url: str) -> httpx.AsyncClient:
    # Each request on a connection of its own, as aiohttp sessions that are made for one request have it.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=WAIT_S)


def rollout(i: int) -> tuple[str, str]:
    """Prompt and completion; the rationales of a prompt have different lengths, hence rewards."""
    return f"page {i % NUM_PROMPTS}", answer(rationale="x" * (1 + i // NUM_PROMPTS))


def expected(i: int) -> float:
    """Format and type, and a certainty of 15, 16, … over the rationale's characters."""
    num_characters = 1 + i // NUM_PROMPTS
    return 0.5 + 0.3 + 0.005 * (15 + (num_characters - 1) / 2)


async def ask(client: httpx.AsyncClient, i: int) -> float:
    response = await client.post(OPENRLHF, json=openrlhf((*rollout(i), json.dumps(TERMINATE))))
    response.raise_for_status()
    [reward] = response.json()["rewards"]
    return float(reward)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S / POLL_S)):
        if condition():
            return
        await asyncio.sleep(POLL_S)
    raise AssertionError("it does not come to pass")


async def until_waiting(client: httpx.AsyncClient, num_tokens: int) -> None:
    for _ in range(int(WAIT_S / POLL_S)):
        if await metric(client, "shopr1_queue_tokens") == num_tokens:
            return
        await asyncio.sleep(POLL_S)
    raise AssertionError("not all rollouts come to wait")


def num_tokens(numbers: range) -> int:
    """Tokens of these rollouts, as the queue counts them: each prompt once."""
    rollouts = [rollout(i) for i in numbers]
    return sum(map(len, {prompt for prompt, _ in rollouts})) + sum(len(text) for _, text in rollouts)


async def test_every_rollout_is_answered_and_none_is_computed_twice() -> None:
    policy = Counting()
    numbers = range(NUM_PROMPTS * NUM_COMPLETIONS)
    with served(policy, max_queue_tokens=2**24) as url:
        async with client_of(url) as client:
            # The engine has begun with these when their clients give up.
            impatient = [asyncio.ensure_future(ask(client, 0))]
            await until(lambda: bool(policy.counts))
            # These wait behind it; what their clients leave behind must not be measured beside the next try.
            impatient += [asyncio.ensure_future(ask(client, i)) for i in range(1, NUM_IMPATIENT)]
            await until_waiting(client, num_tokens(range(1, NUM_IMPATIENT)))
            for task in impatient:
                task.cancel()
            await asyncio.gather(*impatient, return_exceptions=True)
            batch = asyncio.gather(*(ask(client, i) for i in numbers))
            await asyncio.sleep(0)  # all are on their way
            policy.gate.set()
            rewards = await batch
    assert rewards == pytest.approx([expected(i) for i in numbers], abs=1e-12)
    assert len(policy.counts) == len(numbers)
    assert set(policy.counts.values()) == {1}
