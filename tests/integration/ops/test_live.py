"""The worst bodies within the limits, while a supervisor asks whether the process is alive.

`BODY_MIB` (64, the default of `max_body_bytes`) is their size.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.support.http import CLICK, TERMINATE, WAIT_S, answer, group
from tests.support.process import FAKE, Process, process

BODY_BYTES = int(float(os.environ.get("BODY_MIB", "64")) * 2**20)
LIMIT_S = 1.0
"""Longest wait for `/health/live`; on a busy machine, the service's own CPU time in it."""
DEADLINE_S = 10.0
POLL_S = 0.02
MAX_TEXT_CHARS = 2**20
WAIT_ALL_S = 15 * WAIT_S
pytestmark = pytest.mark.timeout(int(WAIT_ALL_S) + 300)


@pytest.fixture(scope="module")
def service() -> Iterator[Process]:
    with process(*FAKE, SHOPR1_MAX_BODY_BYTES=str(BODY_BYTES + 2**20)) as running:
        yield running


@dataclass(frozen=True)
class Hostile:
    """A valid body, or one that is refused as late as possible."""

    path: str
    body: bytes
    statuses: frozenset[int]
    method: str = "POST"


def scored(*groups: object) -> Hostile:
    return Hostile("/score", json.dumps({"groups": groups}).encode(), frozenset({200, 413, 504}))


def copies(num_bytes: int) -> int:
    """How many pieces of so many bytes fill a body."""
    return max(1, BODY_BYTES // num_bytes)


def clicks(name: str, num_bytes: int) -> Hostile:
    """Completions that click on something with this name, which is as long as a text may be."""
    action = {"type": "click", "name": name[: MAX_TEXT_CHARS - 200]}
    text = json.dumps({"rationale": "", "action": action}, ensure_ascii=False)
    truth = {**CLICK, "name": name[:8192]}
    body = {"groups": [group(*[text] * min(copies(num_bytes), 256), truth=truth)]}
    encoded = json.dumps(body, ensure_ascii=False).encode()
    return Hostile("/score", encoded, frozenset({200, 413, 504}))


def many_rollouts() -> Hostile:
    num_groups = min(1024, copies(5 * 256))
    return scored(*[group(*["x"] * 256)] * num_groups)


def labels() -> Hostile:
    entries = ({"prompt": f"page {i}", "ground_truth": TERMINATE} for i in range(copies(75)))
    body = json.dumps({"labels": list(entries)}).encode()
    return Hostile("/labels", body, frozenset({200, 413}), "PUT")


def statistics() -> Hostile:
    rows = [{f"number {k}": i for k in range(20)} for i in range(copies(20 * 24))]
    body = json.dumps({"verify_responses": rows}).encode()
    return Hostile("/dialects/nemo_gym/aggregate_metrics", body, frozenset({200, 413, 422}))


def openrlhf() -> Hostile:
    num = copies(90)
    body = {"query": ["page" + "x"] * num, "prompts": ["page"] * num, "labels": [TERMINATE] * num}
    return Hostile(
        "/dialects/openrlhf/get_reward", json.dumps(body).encode(), frozenset({200, 413, 422, 504})
    )


BODIES: dict[str, Callable[[], Hostile]] = {
    "similar words": lambda: clicks("a b " * 2**18, 2**20),
    "one word": lambda: clicks("é" * 2**20, 2**21),
    "marks": lambda: clicks("e" + "\u0301\u0316" * 2**19, 2**21),
    "token ids": lambda: scored(group({"token_ids": [97] * min(copies(4), 4 * 2**20)})),
    "a prompt of ids": lambda: scored(
        group(answer(), prompt={"token_ids": [97] * min(copies(4), 2**22 - 999)})
    ),
    "rollouts": many_rollouts,
    "messages": lambda: scored(
        group(answer(), prompt=[{"role": "user", "content": "x"}] * min(copies(33), 49_000))
    ),
    "braces": lambda: scored(group(*["{" * MAX_TEXT_CHARS] * min(copies(2**20), 256))),
    "keys": lambda: scored(group("x", truth={**TERMINATE, **{str(i): 0 for i in range(copies(16))}})),
    "wrong values": lambda: Hostile(
        "/score", b'{"groups": [%s0]}' % (b"0," * min(copies(2), 5 * 2**20 - 9)), frozenset({422})
    ),
    "more values than may be read": lambda: Hostile(
        "/score", b'{"groups": [%s0]}' % (b"0," * copies(2)), frozenset({413, 422})
    ),
    "labels": labels,
    "statistics": statistics,
    "OpenRLHF": openrlhf,
}


def longest_wait_s(service: Process, until: threading.Event) -> float:
    """The longest wait for `/health/live` until the event is set, or the service's CPU time in it."""
    waits = []
    with httpx.Client(base_url=service.url, timeout=WAIT_S) as client:
        while True:
            begin_s, begin_cpu_s = time.perf_counter(), service.cpu_s()
            client.get("/health/live").raise_for_status()
            waits.append(min(time.perf_counter() - begin_s, service.cpu_s() - begin_cpu_s))
            if until.wait(POLL_S):
                return max(waits)


@pytest.mark.parametrize("name", BODIES)
def test_the_process_answers_while_it_works_on_the_largest_bodies(service: Process, name: str) -> None:
    hostile, done, statuses = BODIES[name](), threading.Event(), list[int]()
    assert len(hostile.body) <= BODY_BYTES + 2**20

    def send() -> None:
        headers = {"Content-Type": "application/json", "X-Request-Timeout": str(DEADLINE_S)}
        try:
            sent = httpx.request(
                hostile.method,
                service.url + hostile.path,
                content=hostile.body,
                headers=headers,
                timeout=WAIT_ALL_S,
            )
            statuses.append(sent.status_code)
        finally:
            done.set()

    sender = threading.Thread(target=send)
    sender.start()
    waited_s = longest_wait_s(service, done)
    sender.join()
    num_mib = len(hostile.body) / 2**20
    print(f"\n{num_mib:.1f} MiB: {statuses}, /health/live {waited_s:.3f} s")
    assert statuses
    assert hostile.statuses.issuperset(statuses)
    assert waited_s < LIMIT_S
