"""Twice the service's capacity for minutes, from clients that do not wait for each other.

`LOAD_SECONDS` (300) is the duration. GroupCertainties are always printed (`pytest -s`).
"""

import asyncio
import itertools
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.http import CLICK, TERMINATE, WAIT_S, answer, group
from tests.support.process import EMBEDDED, Process, process

LOAD_S = float(os.environ.get("LOAD_SECONDS", "300"))
pytestmark = pytest.mark.timeout(int(LOAD_S) * 3 + 900)

SETTINGS = {
    "SHOPR1_DTYPE": "float32",
    "SHOPR1_PREFIX_CACHE_BYTES": "0",  # every prompt costs as much as a new one
    "SHOPR1_MAX_QUEUE_TOKENS": "24000",
}
MAX_QUEUE_TOKENS = 24_000
NUM_SHORT, NUM_LONG = 80, 4
"""Many prompts, because queued groups with the same prompt are computed together."""
LONG_EVERY = 20
NUM_CLIENTS = 12
NUM_LONG_TOKENS = 6000
_WORDS = [
    "blue",
    "stoneware",
    "mug",
    "with",
    "a",
    "handle",
    "and",
    "0.35",
    "l",
    "for",
    "tea",
    "or",
    "coffee",
    "in",
    "stock",
]


@dataclass(frozen=True)
class Request:
    """A group and its self-certainty from an idle service."""

    body: dict[str, Any]
    is_long: bool
    nats: Sequence[float | None] = ()


@dataclass(frozen=True)
class Answer:
    request: Request
    status: int
    duration_s: float
    retry_after: str | None
    nats: Sequence[float | None]


@dataclass
class Load:
    """Results of the overload."""

    answers: list[Answer] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    num_engine_tokens: float = 0.0
    duration_s: float = 0.0

    def accepted(self, *, is_long: bool | None = None) -> list[Answer]:
        return [a for a in self.answers if a.status == 200 and is_long in (None, a.request.is_long)]

    def num_sent(self, *, is_long: bool) -> int:
        return sum(a.request.is_long is is_long for a in self.answers)


def request(number: int, *, is_long: bool) -> Request:
    """A request with a unique prompt. With `include` the response is not remembered for duplicates."""
    randomly = random.Random(number)
    num_words = NUM_LONG_TOKENS - 500 if is_long else 200
    page = " ".join(randomly.choices(_WORDS, k=num_words))
    completions = [answer(a, f"I want no. {number}: {i}") for i in (1, 2) for a in (CLICK, TERMINATE)]
    body = {"groups": [group(*completions, truth=CLICK, prompt=page)], "include": ["tokens"]}
    return Request(body, is_long)


async def ask(client: httpx.AsyncClient, given: Request) -> Answer:
    start_s = time.monotonic()
    answered = await client.post("/score", json=given.body)
    duration_s = time.monotonic() - start_s
    nats = _nats(answered.json()) if answered.status_code == 200 else []
    return Answer(given, answered.status_code, duration_s, answered.headers.get("Retry-After"), nats)


def _nats(body: Any) -> list[float | None]:
    return [reward["details"]["self_certainty_nats"] for reward in body["groups"][0]["rewards"]]


def client_of(service: Process) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=service.url, timeout=WAIT_S * 10, limits=limits)


async def idle_results(service: Process) -> list[Request]:
    """The requests with their numbers, sent one after the other."""
    requests = [request(i, is_long=i >= NUM_SHORT) for i in range(NUM_SHORT + NUM_LONG)]
    async with client_of(service) as client:
        return [Request(r.body, r.is_long, (await ask(client, r)).nats) for r in requests]


def mixture(requests: Sequence[Request]) -> Iterator[Request]:
    short, long = itertools.cycle(requests[:NUM_SHORT]), itertools.cycle(requests[NUM_SHORT:])
    for number in itertools.count(1):
        yield next(short if number % LONG_EVERY else long)


async def capacity(service: Process, requests: Sequence[Request]) -> float:
    """Requests per second in a closed loop, in which each client waits for its response."""
    stream, num_done = mixture(requests), 0
    until_s = time.monotonic() + LOAD_S / 5

    async def closed_loop(client: httpx.AsyncClient) -> None:
        nonlocal num_done
        while time.monotonic() < until_s:
            answered = await ask(client, next(stream))
            num_done += answered.status == 200
            # Concurrent long ones may fill the queue here as well.
            await asyncio.sleep(float(answered.retry_after or 0))

    start_s = time.monotonic()
    async with client_of(service) as client:
        await asyncio.gather(*(closed_loop(client) for _ in range(NUM_CLIENTS)))
    return num_done / (time.monotonic() - start_s)


async def overload(service: Process, requests: Sequence[Request], rate: float) -> Load:
    """Requests at this rate and at random times, independent of earlier responses."""
    load, stream, randomly = Load(), mixture(requests), random.Random(3)
    pending: list[asyncio.Task[Answer]] = []
    start_s = due_s = time.monotonic()
    tokens = await engine_tokens(service)
    async with client_of(service) as client:
        while due_s < start_s + LOAD_S:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            pending.append(asyncio.create_task(ask(client, next(stream))))
            due_s += randomly.expovariate(rate)
            if len(load.rss_bytes) <= due_s - start_s:
                load.rss_bytes.append(service.rss_bytes())
        load.answers = await asyncio.gather(*pending)
    load.duration_s = time.monotonic() - start_s
    load.num_engine_tokens = await engine_tokens(service) - tokens
    return load


async def engine_tokens(service: Process) -> float:
    async with client_of(service) as client:
        text = (await client.get("/metrics")).text
    families = text_string_to_metric_families(text)
    return sum(s.value for f in families for s in f.samples if s.name == "shopr1_engine_tokens_total")


def percentile(answers: Sequence[Answer], share: float) -> float:
    durations = sorted(each.duration_s for each in answers)
    return durations[min(len(durations) - 1, int(share * len(durations)))]


def report(load: Load, per_s: float) -> None:
    for name, is_long in (("short", False), ("long", True)):
        accepted, num_sent = load.accepted(is_long=is_long), load.num_sent(is_long=is_long)
        p50_s, p99_s = percentile(accepted, 0.5), percentile(accepted, 0.99)
        print(
            f"\n{name}: {num_sent} sent, {len(accepted)} accepted, p50 {p50_s:.1f} s, p99 {p99_s:.1f} s",
            end="",
        )
    print(f"\ncapacity {per_s:.2f}/s, accepted {len(load.accepted()) / load.duration_s:.2f}/s", end="")
    print(f"\nmemory {load.rss_bytes[len(load.rss_bytes) // 3] >> 20} -> {load.rss_bytes[-1] >> 20} MiB")


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    with process(*EMBEDDED, **SETTINGS) as service:
        requests = asyncio.run(idle_results(service))
        per_s = asyncio.run(capacity(service, requests))
        result = asyncio.run(overload(service, requests, 2 * per_s))
        report(result, per_s)
        yield result


def test_every_request_is_scored_correctly_or_rejected(load: Load) -> None:
    assert {a.status for a in load.answers} == {200, 429}
    for accepted in load.accepted():
        # Sums depend on the batch: 1e-6 nats (docs/engine.md), and more for long prompts.
        assert accepted.nats == pytest.approx(accepted.request.nats, abs=1e-4)


def test_rejected_requests_have_retry_after(load: Load) -> None:
    rejected = [a for a in load.answers if a.status == 429]
    assert len(rejected) > len(load.answers) / 10  # the service was overloaded
    assert all(a.retry_after is not None and int(a.retry_after) >= 1 for a in rejected)


def test_memory_is_flat(load: Load) -> None:
    """Compares the last third with the middle one: the first fills allocators."""
    third = len(load.rss_bytes) // 3
    middle, last = load.rss_bytes[third : 2 * third], load.rss_bytes[2 * third :]
    assert statistics.median(last) < 1.03 * statistics.median(middle) + 2**24


def test_the_queues_limit_bounds_the_wait(load: Load) -> None:
    """A request waits at most for a full queue, the current batch and its own.

    Shorter groups may pass a long one for its own duration, which is added.
    """
    tokens_per_s = load.num_engine_tokens / load.duration_s
    longest_s = NUM_LONG_TOKENS / tokens_per_s
    bound_s = MAX_QUEUE_TOKENS / tokens_per_s + 3 * longest_s
    assert percentile(load.accepted(), 0.99) <= bound_s


def test_long_prompts_do_not_starve_short_ones(load: Load) -> None:
    short, long = load.accepted(is_long=False), load.accepted(is_long=True)
    assert long, "no long request was accepted"
    assert percentile(short, 0.5) < percentile(long, 0.5)
    assert len(short) / load.num_sent(is_long=False) >= len(long) / load.num_sent(is_long=True)
