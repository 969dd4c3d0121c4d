"""Clients that score all the time while the policy changes, and what their answers are held against."""

import asyncio
import functools
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from shopr1_rewards import Span, load_recipe
from tests.support.http import CLICK, TERMINATE, WAIT_S, answer, group
from tests.support.models import Reference, byte_level, ids_of, slow_overlapping, token_bytes

NUM_CLIENTS = 8
TOLERANCE_NATS = 1e-4
"""Fp32 against fp64."""
RULES = load_recipe("shop_r1").self_certainty
_RATIONALE_START = 15

_SESSION = "A shop for tea and mugs. You may search, click or end the session. So far: search, click. "
PROMPTS = [
    _SESSION,
    *(f"{_SESSION}{page}" for page in ("Page 1", "Page 12", "Page 12: blue mugs", "Basket")),
]
RATIONALES = ["I want no more.", "The blue mug is cheaper.", "Too sweet!", "3 € is too much"]
TEXTS = [answer(action, rationale) for rationale in RATIONALES for action in (CLICK, TERMINATE)]

Target = dict[str, Any]
"""Members of a request that say what it is to be scored with."""


@dataclass(frozen=True)
class Seen:
    """A group of an answer.

    Attributes:
        turn: counts the requests of a client.
        earliest, latest: changes that were done when the request was sent, and begun when its answer came.
    """

    client: int
    turn: int
    earliest: int
    latest: int
    target: Target
    sent: dict[str, Any]
    score: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.score["policy_number"])


class Course:
    """How far the changes are, and the clients behind them. A change is begun before it is sent."""

    def __init__(self) -> None:
        self.num_begun = 0
        self.num_done = 0
        self.is_over = False
        self._followed = [0] * NUM_CLIENTS
        self._moved = asyncio.Event()

    async def change(self, send: Callable[[int], Awaitable[None]]) -> None:
        """One change, and an answer to each client that asked for it afterwards."""
        self.num_begun += 1
        await send(self.num_begun)
        self.num_done += 1
        while min(self._followed) < self.num_done:
            self._moved.clear()
            await self._moved.wait()

    def answered(self, client: int, earliest: int) -> None:
        self._followed[client] = earliest
        self._moved.set()


@dataclass
class Traffic:
    """Requests of `NUM_CLIENTS` clients and their responses."""

    http: httpx.AsyncClient
    course: Course
    seen: list[Seen] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    _turns: Iterator[int] = field(default_factory=itertools.count)

    async def score(self, client: int, *groups: Any, include: Sequence[str] = (), **target: Any) -> None:
        """Send one request. Its response is checked at the end, so that checks do not slow it down."""
        await self._send(client, next(self._turns), groups, include, target)

    async def parts(self, client: int, prompt: str, **target: Any) -> None:
        """Rollouts of one prompt in two requests at once. Each names its own version."""
        turn = next(self._turns)
        halves = [group(*texts, prompt=prompt) for texts in (TEXTS[:1], TEXTS[1:4])]
        await asyncio.gather(*(self._send(client, turn, [half], (), target) for half in halves))

    async def _send(
        self, client: int, turn: int, groups: Sequence[Any], include: Sequence[str], target: Target
    ) -> None:
        earliest = self.course.num_done
        given = {"groups": groups, "include": include, **target}
        response = await self.http.post("/score", json=given)
        latest, body = self.course.num_begun, response.json()
        if not response.is_success:
            self.refusals[body["code"]] += 1
            return
        for sent, score in zip(groups, body["groups"], strict=True):
            self.seen.append(Seen(client, turn, earliest, latest, target, sent, score))
        self.course.answered(client, earliest)


Ask = Callable[[Traffic, int, int], Awaitable[None]]
"""Request of a client by its number and its number of earlier requests."""


async def under_traffic(url: str, ask: Ask, change: Callable[[Course], Awaitable[None]]) -> Traffic:
    """All that was seen while the changes were made."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_S, limits=limits) as http:
        traffic = Traffic(http, Course())

        async def client(number: int) -> None:
            for turn in itertools.count():
                if traffic.course.is_over:
                    return
                await ask(traffic, number, turn)

        async with asyncio.TaskGroup() as tasks:
            for number in range(NUM_CLIENTS):
                tasks.create_task(client(number))
            await change(traffic.course)
            traffic.course.is_over = True
    return traffic


# --- checks -----------------------------------------------------------------------------------------


class Truth:
    """Self-certainty of a rationale's tokens from all logits of the policy's copy in fp64."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self.values = functools.cache(self._values)

    def mean(self, prompt: str, text: str) -> float:
        values = self.values(prompt, text)
        return sum(values) / len(values)

    def _values(self, prompt: str, text: str) -> list[float]:
        ids = ids_of(_tokenizer(), text)
        end = text.index('", "action"')
        measured = slow_overlapping(token_bytes(_tokenizer(), ids), text, Span(_RATIONALE_START, end))
        return self._reference.values(ids_of(_tokenizer(), prompt), ids, measured, RULES)


def check_far_apart(truths: Sequence[Truth]) -> None:
    """No answer of one could pass for one of another."""
    for some, others in itertools.combinations(truths, 2):
        for prompt, text in itertools.product(PROMPTS, TEXTS):
            assert abs(some.mean(prompt, text) - others.mean(prompt, text)) > 20 * TOLERANCE_NATS


def check_values(seen: Seen, truth: Truth) -> None:
    """Each rollout, and where it was asked for each token."""
    prompt, texts = seen.sent["prompt"], seen.sent["completions"]
    for text, reward in zip(texts, seen.score["rewards"], strict=True):
        details = reward["details"]
        expected = truth.mean(prompt, text)
        assert details["self_certainty_nats"] == pytest.approx(expected, rel=0, abs=TOLERANCE_NATS), seen
        if (tokens := details["tokens"]) is not None:
            values = [token["value"] for token in tokens]
            assert values == pytest.approx(truth.values(prompt, text), rel=0, abs=TOLERANCE_NATS), seen


def turns_of(seen: Sequence[Seen], client: int) -> list[list[Seen]]:
    """A client's answers by its requests, in their order."""
    own = sorted((each for each in seen if each.client == client), key=lambda each: each.turn)
    return [list(turn) for _, turn in itertools.groupby(own, key=lambda each: each.turn)]


@functools.cache
def _tokenizer() -> Any:
    return byte_level()
