"""Weights change fifty times while clients score: each answer is of the version that it names."""

import asyncio
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
import safetensors.torch
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from shopr1_client import Client
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
STATES = "ABC"
PARTIAL = "model.layers.1."
"""B is A with this layer changed: a part of the weights leads from one to the other."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@torch.no_grad()
def changed(prefix: str, seed: int) -> dict[str, Tensor]:
    """The weights of A, and random numbers on those whose names begin so."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in tiny_model().state_dict().items():
        noise = 0.3 * torch.randn(tensor.shape, generator=generator)
        weights[name] = tensor + noise if name.startswith(prefix) else tensor.clone()
    return weights


class States:
    """The three of them, in memory, on disk and in fp64."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.weights = {"A": changed("none", 0), "B": changed(PARTIAL, 2), "C": changed("", 11)}
        self.truths: dict[str, Truth] = {}
        for name, weights in self.weights.items():
            model = tiny_model()
            model.load_state_dict(weights)
            model.save_pretrained(root / name)
            byte_level().save_pretrained(root / name)
            (root / f"{name}-part").mkdir()
            safetensors.torch.save_file(self.part(name), root / f"{name}-part" / "model.safetensors")
            self.truths[name] = Truth(Reference(model))

    def part(self, name: str) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in self.weights[name].items() if key.startswith(PARTIAL)}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> States:
    return States(tmp_path_factory.mktemp("states"))


@pytest.fixture
def service(states: States) -> Iterator[Process]:
    settings = {
        "SHOPR1_POLICY": str(states.root / "A"),
        "SHOPR1_POLICY_ROOTS": str(states.root),
        "SHOPR1_DTYPE": "float32",
        "OMP_NUM_THREADS": "1",
    }
    with process(*EMBEDDED, **settings) as running:
        yield running


class Changer:
    """Brings one of the other states, in one of four ways, and remembers which number is which."""

    def __init__(self, states: States, client: Client) -> None:
        self.history = ["A"]
        self.ways: set[tuple[bool, bool]] = set()
        self._states = states
        self._client = client
        self._random = random.Random(5)

    async def run(self, course: Course) -> None:
        for _ in range(NUM_CHANGES):
            await course.change(self._send)

    async def _send(self, number: int) -> None:
        former = self.history[-1]
        name = self._random.choice(STATES.replace(former, ""))
        self.history.append(name)
        is_part = {former, name} == {"A", "B"} and self._random.random() < 0.6
        is_path = number % 2 == 0
        self.ways.add((is_part, is_path))
        weights = self._states.part(name) if is_part else self._states.weights[name]
        source = str(self._states.root / (f"{name}-part" if is_part else name)) if is_path else weights
        update = await asyncio.to_thread(self._client.update_policy, source, f"v{number}", partial=is_part)
        assert (update.current.number, update.current.version) == (number, f"v{number}")


async def ask(traffic: Traffic, client: int, turn: int) -> None:
    """All that a request may be, in turns that are each client's own."""
    course, i = traffic.course, client + turn
    prompts, texts = PROMPTS[i % 5 :] + PROMPTS[: i % 5], TEXTS[i % 8 :] + TEXTS[: i % 8]
    lone = group(*texts[:2], prompt=prompts[0])
    match i % 9:
        case 0:
            await traffic.score(client, group(*texts, prompt=prompts[0]))
        case 1:
            await traffic.score(client, *(group(*texts[:3], prompt=prompt) for prompt in prompts[:3]))
        case 2:
            await traffic.parts(client, prompts[0])
        case 3:  # the same of all clients, and twice of each
            for _ in range(2):
                await traffic.score(client, group(*TEXTS[:3], prompt=PROMPTS[turn // 9 % 5]))
        case 4:
            await traffic.score(client, group(*texts[:3], prompt=prompts[0]), include=["tokens"])
        case 5:  # it may be under way
            demand = {"at_least": course.num_begun, "wait_s": WAIT_S}
            await traffic.score(client, lone, policy_version=demand)
        case 6:
            pair = [group(*texts[:2], prompt=prompt) for prompt in prompts[:2]]
            by_name = {"at_least": f"v{course.num_begun}" if course.num_begun else 0, "wait_s": WAIT_S}
            await traffic.score(client, *pair, policy_version=by_name)
        case 7:
            await traffic.score(client, lone, policy_version={"exact": course.num_done})
        case 8:
            await traffic.score(client, lone, policy_version={"at_least": course.num_begun + 1})


def check(seen: Seen, history: Sequence[str], states: States) -> None:
    """Assert that a response's version was loaded between its request and its response."""
    assert seen.earliest <= seen.number <= seen.latest
    assert seen.score["policy_version"] == (f"v{seen.number}" if seen.number else "0")
    check_values(seen, states.truths[history[seen.number]])
    match seen.target.get("policy_version"):
        case {"exact": number}:
            assert seen.number == number
        case {"at_least": str(name)}:
            assert seen.number >= int(name[1:])
        case {"at_least": number}:
            assert seen.number >= number


def check_order(seen: Sequence[Seen]) -> None:
    """Nobody is taken back: what comes later is of the same version or of a later one."""
    for client in range(NUM_CLIENTS):
        turns = [[each.number for each in turn] for turn in turns_of(seen, client)]
        assert all(max(before) <= min(after) for before, after in itertools.pairwise(turns))
        assert len(set(itertools.chain(*turns))) > 2
        assert len(turns) > NUM_CHANGES


def num_repeats(url: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {s.labels["how"]: s.value for s in samples if s.name == "shopr1_repeated_requests_total"}


def test_every_answer_is_of_the_version_that_it_names(service: Process, states: States) -> None:
    check_far_apart(list(states.truths.values()))
    with Client(service.url, timeout_s=WAIT_S) as client:
        changer = Changer(states, client)
        traffic = asyncio.run(under_traffic(service.url, ask, changer.run))
    assert changer.ways == set(itertools.product([False, True], repeat=2))
    assert traffic.refusals.keys() <= {"policy_version", "not_ready"}
    for seen in traffic.seen:
        check(seen, changer.history, states)
    check_order(traffic.seen)
    assert min(num_repeats(service.url)[how] for how in ("answered", "joined")) > 0
    # Updates and scoring were beside each other indeed.
    assert any(seen.earliest < seen.number for seen in traffic.seen)
    assert any(seen.number < seen.latest for seen in traffic.seen)
