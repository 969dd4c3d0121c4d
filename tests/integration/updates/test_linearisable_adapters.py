"""Adapters come fifty times while clients score, and as many updates fail: each answer is of its adapter."""

import asyncio
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch

from shopr1_client.wire_policy import ADAPTER_CONFIG_KEY, BASE
from tests.support.adapters import merged, random_tensors
from tests.support.broken_updates import ADAPTER_CONFIG, Sender
from tests.support.http import WAIT_S, group
from tests.support.models import Reference, byte_level, one_thread, tiny_model
from tests.support.process import EMBEDDED, Process, process
from tests.support.traffic import (
    NUM_CLIENTS,
    PROMPTS,
    TEXTS,
    Course,
    Seen,
    Traffic,
    Truth,
    check_far_apart,
    check_values,
    turns_of,
    under_traffic,
)

NUM_CHANGES = 50
NAMES = ("a", "b")
SEEDS = (4, 5, 10, 12)
"""Adapters that are loaded repeatedly under both names."""
NUM_KEPT = 2


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@dataclass(frozen=True)
class Push:
    """A change: an adapter that comes."""

    number: int
    name: str
    seed: int
    is_default: bool
    is_path: bool


@dataclass(frozen=True)
class Loaded:
    """Loaded adapters after a change."""

    default: str = BASE
    kept: dict[str, tuple[Push, ...]] = field(default_factory=dict)

    def after(self, push: Push) -> "Loaded":
        kept = {**self.kept, push.name: (*self.kept.get(push.name, ()), push)[-NUM_KEPT:]}
        return replace(self, kept=kept, default=push.name if push.is_default else self.default)

    def newest(self, name: str | None) -> tuple[str | None, int]:
        """Adapter and number of what scores a request that names this."""
        name = name or self.default
        return (None, 0) if name == BASE else (name, self.kept[name][-1].number)


def _plan() -> list[Push]:
    randomly = random.Random(2)
    return [
        Push(
            number,
            NAMES[number % 2] if number < 3 else randomly.choice(NAMES),
            randomly.choice(SEEDS),
            is_default=randomly.random() < 0.4,
            is_path=randomly.random() < 0.5,
        )
        for number in range(1, NUM_CHANGES + 1)
    ]


PUSHES = _plan()
HISTORY = list(itertools.accumulate(PUSHES, Loaded.after, initial=Loaded()))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy, and an adapter for each seed."""
    root = tmp_path_factory.mktemp("adapters")
    tiny_model().save_pretrained(root / "policy")
    byte_level().save_pretrained(root / "policy")
    for seed in SEEDS:
        (root / f"{seed}").mkdir()
        safetensors.torch.save_file(
            random_tensors(tiny_model(), seed=seed), root / f"{seed}" / "adapter_model.safetensors"
        )
        (root / f"{seed}" / "adapter_config.json").write_text(ADAPTER_CONFIG)
    return root


@pytest.fixture(scope="module")
def truths() -> dict[int, Truth]:
    """By seed; that of the policy itself is 0."""
    model = tiny_model()
    merged_ones = {seed: Truth(merged(model, random_tensors(model, seed=seed))) for seed in SEEDS}
    return {0: Truth(Reference(model)), **merged_ones}


@pytest.fixture
def service(root: Path) -> Iterator[Process]:
    settings = {
        "SHOPR1_POLICY": str(root / "policy"),
        "SHOPR1_POLICY_ROOTS": str(root),
        "SHOPR1_ADAPTER_VERSIONS": str(NUM_KEPT),
        "SHOPR1_DTYPE": "float32",
        "OMP_NUM_THREADS": "1",
    }
    with process(*EMBEDDED, **settings) as running:
        yield running


class Changer:
    """Brings the adapters in turn; before each, something that fails."""

    def __init__(self, url: str, root: Path) -> None:
        self._broken = Sender(url, root)
        self._root = root
        self._http = httpx.Client(base_url=url, timeout=WAIT_S)

    async def run(self, course: Course) -> None:
        for fail, _ in zip(itertools.cycle(self._broken.all), PUSHES, strict=False):
            before = await asyncio.to_thread(self._broken.versions)
            await asyncio.to_thread(fail)
            assert await asyncio.to_thread(self._broken.versions) == before
            await course.change(self._send)

    async def _send(self, number: int) -> None:
        push = PUSHES[number - 1]
        current = await asyncio.to_thread(self._path if push.is_path else self._upload, push)
        assert (current["adapter"], current["number"]) == (push.name, number)

    def _path(self, push: Push) -> Any:
        path = str(self._root / f"{push.seed}")
        body = {"name": push.name, "path": path, "default": push.is_default}
        return self._http.post("/policy/adapters", json=body).raise_for_status().json()["current"]

    def _upload(self, push: Push) -> Any:
        tensors = random_tensors(tiny_model(), seed=push.seed)
        body = safetensors.torch.save(tensors, {ADAPTER_CONFIG_KEY: ADAPTER_CONFIG})
        params = {"default": push.is_default}
        answered = self._http.put(f"/policy/adapters/{push.name}", params=params, content=body)
        return answered.raise_for_status().json()["current"]

    def close(self) -> None:
        self._broken.close()
        self._http.close()


async def ask(traffic: Traffic, client: int, turn: int) -> None:
    course, i = traffic.course, client + turn
    loaded = HISTORY[course.num_done]
    names = [*loaded.kept, BASE]
    prompt, texts = PROMPTS[i % 5], TEXTS[i % 4 : i % 4 + 3]
    lone = group(*texts, prompt=prompt)
    match i % 7:
        case 0:
            await traffic.score(client, lone, group(*texts, prompt=PROMPTS[0]), adapter=names[i % len(names)])
        case 1:
            await traffic.score(client, lone, adapter=BASE, include=["tokens"])
        case 2:
            await traffic.score(client, lone, group(*TEXTS[:2], prompt=PROMPTS[0]))
        case 3:
            await traffic.parts(client, prompt)
        case 4:  # it may have to go before it is its turn
            for name, kept in loaded.kept.items():
                await traffic.score(client, lone, adapter=name, policy_version={"exact": kept[0].number})
        case 5:  # it may be under way
            push = PUSHES[max(course.num_begun, 1) - 1]
            if push.name in loaded.kept:
                demand = {"at_least": push.number, "wait_s": WAIT_S}
                await traffic.score(client, lone, adapter=push.name, policy_version=demand)
        case 6:
            await traffic.score(client, lone, adapter=names[0])
            await traffic.score(client, lone, adapter=names[0])


def check(seen: Seen, truths: dict[int, Truth]) -> None:
    """Assert that the version was the target between the request and the response."""
    adapter, states = seen.score["adapter"], HISTORY[seen.earliest : seen.latest + 1]
    check_values(seen, truths[PUSHES[seen.number - 1].seed if seen.number else 0])
    match seen.target.get("policy_version"):
        case {"exact": number}:
            assert (adapter, seen.number) == (seen.target["adapter"], number)
            kept = [push.number for loaded in states for push in loaded.kept[adapter]]
            assert number in kept
            return
        case {"at_least": number}:
            assert seen.number >= number
    assert (adapter, seen.number) in [loaded.newest(seen.target.get("adapter")) for loaded in states]


def check_order(seen: list[Seen]) -> None:
    """Requests without a version for the same adapter never get an older version."""
    for client, name in itertools.product(range(NUM_CLIENTS), NAMES):
        newest = [
            each for each in seen if each.target.get("adapter") == name and "exact" not in str(each.target)
        ]
        turns = [[each.number for each in turn] for turn in turns_of(newest, client)]
        assert all(max(before) <= min(after) for before, after in itertools.pairwise(turns))
        assert len(set(itertools.chain(*turns))) > 2


def test_every_answer_is_of_the_adapter_that_it_names(
    service: Process, root: Path, truths: dict[int, Truth]
) -> None:
    check_far_apart(list(truths.values()))
    changer = Changer(service.url, root)
    traffic = asyncio.run(under_traffic(service.url, ask, changer.run))
    changer.close()
    assert traffic.refusals.keys() <= {"policy_version", "not_ready"}
    for seen in traffic.seen:
        check(seen, truths)
    check_order(traffic.seen)
    exact = [seen for seen in traffic.seen if "exact" in str(seen.target)]
    older = [s for s in exact if HISTORY[s.earliest].newest(s.target["adapter"])[1] > s.number]
    assert len(older) > NUM_CHANGES
