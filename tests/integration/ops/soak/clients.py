"""Clients of the soak: every kind of request that trainers send, and clients that give up or break off."""

import asyncio
import contextlib
import itertools
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import httpx

from shopr1_client import AsyncClient
from shopr1_client.wire import ScoreRequest
from shopr1_client.wire_policy import BASE
from tests.integration.ops.soak.history import ADAPTERS, History
from tests.integration.ops.soak.judge import Judge, Sent, Window
from tests.integration.ops.soak.material import (
    COMPLETIONS,
    PROMPTS,
    TOO_LONG,
    TRUTHS,
    Completion,
    templated,
    tokenizer,
)
from tests.support.http import WAIT_S
from tests.support.models import ids_of
from tests.support.trainer_requests import LLAMA_FACTORY, OPENRLHF, SLIME, VERIFY, axolotl, openrlhf, slime

RUN = "whole"
"""Run of the requests that wait for their answers. The service must count exactly their rollouts."""
CUT_RUN = "cut"
"""Run of the requests whose first try is broken off."""
LONGEST_CUT_S = 0.03
BURST = 16


@dataclass
class Traffic:
    """State that all clients share.

    Attributes:
        num_requests: requests that were sent, and answered if they waited for it; by kind.
        num_rollouts: rollouts that were answered, by run.
    """

    url: str
    http: httpx.AsyncClient
    history: History
    judge: Judge
    num_requests: Counter[str] = field(default_factory=Counter)
    num_rollouts: Counter[str] = field(default_factory=Counter)
    num_retries: Counter[int] = field(default_factory=Counter)
    is_over: bool = False
    _answered: asyncio.Event = field(default_factory=asyncio.Event)
    _fresh: "itertools.count[int]" = field(default_factory=itertools.count)

    async def wait_for_answers(self, num: int) -> None:
        """Return after so many more requests, or at the end."""
        until = self.num_requests.total() + num
        while self.num_requests.total() < until and not self.is_over:
            self._answered.clear()
            await self._answered.wait()

    def count(self, kind: str) -> None:
        self.num_requests[kind] += 1
        self._answered.set()

    def end(self) -> None:
        self.is_over = True
        self._answered.set()

    def fresh_prompt(self) -> str:
        """A prompt that nobody has sent before."""
        return f"{PROMPTS[0]}Order {next(self._fresh)}\n"

    def truth_of(self, prompt: str) -> Mapping[str, str]:
        """The human's action, always the same one for a prompt."""
        return TRUTHS[PROMPTS.index(prompt) % len(TRUTHS)] if prompt in PROMPTS else TRUTHS[0]

    async def register_labels(self) -> None:
        """Ground truths for LLaMA-Factory, which sends none."""
        labels = [{"prompt": prompt, "ground_truth": self.truth_of(prompt)} for prompt in PROMPTS]
        answered = await self.http.put("/labels", json={"labels": labels}, headers={"X-Run-ID": RUN})
        answered.raise_for_status()


class SoakClient:
    """One client. Its requests follow from its seed."""

    def __init__(self, traffic: Traffic, seed: str) -> None:
        self._traffic = traffic
        self._random = random.Random(seed)
        self._kinds: dict[Callable[[], Awaitable[None]], int] = {
            self.groups: 20,
            self.tokens: 5,
            self.demand: 12,
            self.adapter: 12,
            self.openrlhf: 10,
            self.slime: 8,
            self.llama_factory: 6,
            self.nemo_gym: 8,
            self.same_twice: 5,
            self.broken_off: 12,
            self.impatient: 4,
            self.reset: 3,
            self.malformed: 4,
            self.too_long: 3,
            self.burst: 1,
            self.python_client: 3,
        }

    async def run(self) -> None:
        """Send requests until the end. A request that fails without an answer is lost."""
        kinds, weights = list(self._kinds), list(self._kinds.values())
        while not self._traffic.is_over:
            ask = self._random.choices(kinds, weights)[0]
            name = ask.__name__
            try:
                await ask()
            except Exception as error:  # the soak goes on and reports it
                self._traffic.judge.fail("lost", f"{name}: {error!r}")
            self._traffic.count(name)

    # --- requests of the native route ---

    async def groups(self) -> None:
        await self._score([self._group() for _ in range(self._random.randint(1, 3))])

    async def tokens(self) -> None:
        await self._score([self._group()], include=["tokens"])

    async def demand(self) -> None:
        """A version that is loaded, that was, that is on its way, or that is to come."""
        history = self._traffic.history
        name = self._random.choice([None, *history.newest.adapters])
        current = history.newest.find({"adapter": name} if name else {})
        number = max(0, history.num_begun - self._random.randint(0, 3))
        demand = self._random.choice(
            [
                {"exact": current},
                {"exact": number},
                {"at_least": number},
                {"at_least": history.num_begun + 1},
            ]
        )
        await self._score([self._group()], policy_version=demand, adapter=name)

    async def adapter(self) -> None:
        name = self._random.choice([BASE, *ADAPTERS])
        await self._score([self._group(), self._group()], adapter=name)

    async def too_long(self) -> None:
        """A rollout without a reward among others with one."""
        group = self._group()
        await self._score([Sent(group.prompt, group.truth, [*group.completions, TOO_LONG])], form="text")

    async def burst(self) -> None:
        """More at once than the queue holds: some are refused with 429, and come again."""
        await asyncio.gather(*(self._score([self._group(6)]) for _ in range(BURST)))

    async def same_twice(self) -> None:
        """Two samples with the same texts: both count."""
        group = [self._group()]
        await asyncio.gather(self._score(group, form="text"), self._score(group, form="text"))

    async def python_client(self) -> None:
        """The project's own client, which splits and retries."""
        traffic, groups = self._traffic, [self._group() for _ in range(6)]
        request = ScoreRequest.model_validate({"groups": [_body(group, "text", "text") for group in groups]})
        earliest = traffic.history.num_done
        async with AsyncClient(traffic.url, run=RUN, timeout_s=WAIT_S, retry_for_s=WAIT_S) as client:
            answered = await client.score(request)
        window = Window(earliest, traffic.history.num_begun)
        traffic.judge.check_response(groups, {}, window, answered.model_dump(mode="json"))
        traffic.num_rollouts[RUN] += sum(len(group.completions) for group in groups)

    # --- trainers ---

    async def openrlhf(self) -> None:
        group = self._group()
        rollouts = [(group.prompt, each.text, dict(group.truth)) for each in group.completions]
        body, window = await self._dialect(OPENRLHF, openrlhf(*rollouts), len(rollouts))
        nats = body["extra_logs"]["shopr1/self_certainty_nats"]
        nats = nats if isinstance(nats, list) else [nats]
        self._traffic.judge.check_values([group], window, body["rewards"], nats)

    async def slime(self) -> None:
        group = self._group(1)
        sent = slime(group.prompt, group.completions[0].text, dict(group.truth))
        body, window = await self._dialect(f"{SLIME}?object=true", sent, 1)
        self._traffic.judge.check_values(
            [group], window, [body["reward"]], [body["shopr1/self_certainty_nats"]]
        )

    async def llama_factory(self) -> None:
        prompt = self._random.choice(PROMPTS)
        group = Sent(prompt, self._traffic.truth_of(prompt), self._completions(4))
        sent = {"model": "m", "messages": [prompt + each.text for each in group.completions]}
        body, window = await self._dialect(LLAMA_FACTORY, sent, len(group.completions))
        self._traffic.judge.check_values([group], window, body["scores"], None)

    async def nemo_gym(self) -> None:
        prompt = self._prompt()
        group = Sent(templated(prompt), self._traffic.truth_of(prompt), self._completions(1))
        sent = axolotl(prompt, group.completions[0].text, ground_truth=dict(group.truth))
        body, window = await self._dialect(VERIFY, sent, 1)
        self._traffic.judge.check_values(
            [group], window, [body["reward"]], [body["shopr1/self_certainty_nats"]]
        )

    # --- clients that misbehave ---

    async def broken_off(self) -> None:
        """The connection breaks while the request waits or is computed; then it comes again."""
        group, headers = [self._group()], self._retry_headers()
        first = asyncio.create_task(self._try(group, headers))
        await asyncio.sleep(self._random.uniform(0, LONGEST_CUT_S))
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        await self._score(group, form="text", headers=headers)

    async def impatient(self) -> None:
        """The deadline passes, perhaps; then the request comes again."""
        group, headers = [self._group()], self._retry_headers()
        timeout_s = self._random.uniform(0.001, LONGEST_CUT_S)
        await self._try(group, {**headers, "X-Request-Timeout": f"{timeout_s:.4f}"})
        await self._score(group, form="text", headers=headers)

    async def reset(self) -> None:
        """Half a request, and a connection that is gone."""
        body = json.dumps({"groups": [_body(self._group(), "text", "text")]}).encode()
        head = "POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        await asyncio.to_thread(_send_and_reset, self._traffic.url, head.encode() + body[: len(body) // 2])

    async def malformed(self) -> None:
        """Requests that are refused as a whole."""
        body = {"groups": [_body(self._group(), "text", "text")]}
        sent, status = self._random.choice(
            [
                (b'{"groups": [', 400),
                (json.dumps({"groups": [{"prompt": "page", "completions": []}]}).encode(), 422),
                (json.dumps({**body, "recipe": "unknown"}).encode(), 422),
                (json.dumps({**body, "adapter": "unknown"}).encode(), 422),
            ]
        )
        headers = {"Content-Type": "application/json", "X-Run-ID": RUN}
        answered = await self._send("/score", sent, headers)
        if answered.status_code != status:
            self._traffic.judge.fail("wrong", f"malformed: {answered.status_code} {answered.text[:200]}")

    # --- parts ---

    def _retry_headers(self) -> dict[str, str]:
        key = f"{self._random.getrandbits(128):032x}"
        return {"X-Run-ID": CUT_RUN, self._random.choice(["X-Request-ID", "Idempotency-Key"]): key}

    def _prompt(self) -> str:
        return self._random.choice(PROMPTS) if self._random.random() < 0.8 else self._traffic.fresh_prompt()

    def _completions(self, most: int) -> Sequence[Completion]:
        return self._random.choices(COMPLETIONS, k=self._random.randint(1, most))

    def _group(self, most: int = 4) -> Sent:
        prompt = self._prompt()
        return Sent(prompt, self._traffic.truth_of(prompt), self._completions(most))

    async def _try(self, groups: Sequence[Sent], headers: Mapping[str, str]) -> None:
        """A request whose answer nobody needs; it may be refused."""
        body = {"groups": [_body(group, "text", "text") for group in groups]}
        await self._traffic.http.post("/score", json=body, headers=headers)

    async def _score(
        self,
        groups: Sequence[Sent],
        *,
        form: str | None = None,
        headers: Mapping[str, str] | None = None,
        include: Sequence[str] = (),
        **target: Any,
    ) -> None:
        """Send a request until it is answered, and check the answer."""
        traffic = self._traffic
        headers = headers or {"X-Run-ID": RUN}
        forms = [(form or self._form(), form or self._random.choice(["text", "ids"])) for _ in groups]
        sent = [
            replace(group, prompt=templated(group.prompt)) if prompt == "messages" else group
            for group, (prompt, _) in zip(groups, forms, strict=True)
        ]
        bodies = [_body(group, *each) for group, each in zip(groups, forms, strict=True)]
        content = json.dumps({"groups": bodies, "include": include, **target}).encode()
        earliest = traffic.history.num_done
        answered = await self._send("/score", content, {"Content-Type": "application/json", **headers})
        window = Window(earliest, traffic.history.num_begun)
        if answered.is_success:
            traffic.num_rollouts[headers["X-Run-ID"]] += sum(len(group.completions) for group in groups)
            traffic.judge.check_response(sent, target, window, answered.json())
        elif answered.json()["code"] not in traffic.history.possible(target, *_ends(window)):
            traffic.judge.fail("lost", f"{target}: {answered.status_code} {answered.text[:300]}")

    def _form(self) -> str:
        return self._random.choice(["text", "text", "messages", "ids"])

    async def _dialect(self, path: str, body: Any, num_rollouts: int) -> tuple[Any, Window]:
        traffic = self._traffic
        earliest = traffic.history.num_done
        headers = {"Content-Type": "application/json", "X-Run-ID": RUN}
        answered = await self._send(path, json.dumps(body).encode(), headers)
        window = Window(earliest, traffic.history.num_begun)
        answered.raise_for_status()
        traffic.num_rollouts[RUN] += num_rollouts
        return answered.json(), window

    async def _send(self, path: str, content: bytes, headers: Mapping[str, str]) -> httpx.Response:
        """The answer. A server that is full says when to come again."""
        while True:
            answered = await self._traffic.http.post(path, content=content, headers=headers)
            if answered.status_code not in (429, 503):
                return answered
            self._traffic.num_retries[answered.status_code] += 1
            await asyncio.sleep(float(answered.headers["Retry-After"]))


def _ends(window: Window) -> tuple[int, int]:
    return window.earliest, window.latest


def _body(group: Sent, prompt_form: str, completion_form: str) -> dict[str, Any]:
    texts = [completion.text for completion in group.completions]
    prompt: Any = group.prompt
    if prompt_form == "messages":
        prompt = [{"role": "user", "content": group.prompt}]
    if prompt_form == "ids":
        prompt = {"token_ids": ids_of(tokenizer(), group.prompt)}
    completions = [{"token_ids": ids_of(tokenizer(), t)} if completion_form == "ids" else t for t in texts]
    return {"prompt": prompt, "ground_truth": dict(group.truth), "completions": completions}


def _send_and_reset(url: str, data: bytes) -> None:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=WAIT_S) as connection:
        connection.sendall(data)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
