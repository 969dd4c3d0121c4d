"""The policy changes under load on both engines: every answer is right for the version that it names."""

import json
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from torch import Tensor

from shopr1_service.policy.loading import load_policy
from shopr1_service.settings import DType, Settings
from tests.integration.ray.conftest import NUM_REPLICAS, client_of, replica_pids
from tests.integration.ray.test_faults import until
from tests.support.http import answer, group

pytestmark = pytest.mark.timeout(1200)

NUM_UPDATES = 20
NUM_CLIENTS = 4
NUM_BODIES = 7
"""Not a multiple of the number of clients: each client sends all of them in turn."""
PART = "model.layers.7."
BODIES = [
    {"groups": [group(answer(rationale=f"Number {i}, please."), prompt=f"page {i} " * 20)]}
    for i in range(NUM_BODIES)
]

Rewards = tuple[float, ...]


@pytest.fixture(scope="module")
def checkpoints(policy_root: Path) -> list[Path]:
    """Three policies: two that differ in every number, and the second with one layer of the first."""
    base = dict(load_policy(Settings(dtype=DType.FLOAT32, device="cpu")).weights.tensors)
    changed = [_changed(base, seed) for seed in (1, 2)]
    part = {name: tensor for name, tensor in changed[0].items() if name.startswith(PART)}
    folders = []
    for name, tensors in zip("abc", [*changed, {**changed[1], **part}], strict=True):
        folder = policy_root / name
        folder.mkdir()
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        folders.append(folder)
    (policy_root / "part").mkdir()
    safetensors.torch.save_file(part, policy_root / "part" / "model.safetensors")
    return folders


def _changed(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor * (1 + 0.02 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in tensors.items()
    }


def rewards_of(answered: Any) -> Rewards:
    return tuple(reward["reward"] for scored in answered["groups"] for reward in scored["rewards"])


def update(client: httpx.Client, path: Path, version: str, **fields: Any) -> Any:
    body = {"path": str(path), "version": version, **fields}
    return client.post("/policy/update", json=body, timeout=300.0).raise_for_status().json()


def upload(client: httpx.Client, folder: Path, version: str, **params: Any) -> Any:
    content = (folder / "model.safetensors").read_bytes()
    query = {"version": version, **params}
    response = client.put("/policy/weights", params=query, content=content, timeout=300.0)
    return response.raise_for_status().json()


@pytest.fixture(scope="module")
def expected(single: str, checkpoints: list[Path]) -> dict[str, list[Rewards]]:
    """Answers of `shopr1 serve` with each policy, by the first letter of the version's name."""
    by_name = {}
    with client_of(single, "admin") as client:
        for folder in checkpoints:
            update(client, folder, folder.name)
            by_name[folder.name] = [rewards_of(client.post("/score", json=body).json()) for body in BODIES]
    assert len({tuple(rewards) for rewards in by_name.values()}) == len(by_name)
    return by_name


@dataclass
class Load:
    """Clients that score all the time, and the wrong answers that they have received."""

    url: str
    expected: dict[str, list[Rewards]]
    versions: set[str] = field(default_factory=set)
    num_right: int = 0
    wrong: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def score(self, seed: int) -> None:
        with client_of(self.url) as client:
            turn = seed
            while not self.is_over.is_set():
                turn += NUM_CLIENTS
                which = turn % len(BODIES)
                # Each in a run of its own: a duplicate request would get the stored answer.
                response = client.post("/score", json=BODIES[which], headers={"X-Run-ID": f"run-{turn}"})
                self._check(which, response)

    def _check(self, which: int, response: httpx.Response) -> None:
        flaw = self._flaw(which, response)
        with self._lock:
            self.num_right += flaw is None
            self.wrong += [flaw] if flaw else []

    def _flaw(self, which: int, response: httpx.Response) -> str | None:
        if response.status_code != 200:
            return f"{response.status_code} {response.text}"
        body = response.json()
        version = body["groups"][0]["policy_version"]
        self.versions.add(version)
        is_right = rewards_of(body) == self.expected[version[0]][which]
        return None if is_right else f"version {version}: {json.dumps(body)}"

    def run_while(self, work: Callable[[], None]) -> None:
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            clients = [pool.submit(self.score, seed) for seed in range(NUM_CLIENTS)]
            try:
                work()
            finally:
                self.is_over.set()
            for client in clients:
                client.result()


def test_every_answer_is_right_for_the_version_that_it_names(
    cluster: str, checkpoints: list[Path], expected: dict[str, list[Rewards]]
) -> None:
    """Checkpoints, uploads and partial updates in turn; at the end all engines have the last version."""
    first, second, _ = checkpoints
    load = Load(cluster, expected)
    with client_of(cluster, "admin") as client:
        update(client, first, "a0")

        def change() -> None:
            for number in range(1, NUM_UPDATES + 1):
                match number % 4:
                    case 1:
                        made = update(client, second, f"b{number}")
                    case 2:
                        made = update(client, second.with_name("part"), f"c{number}", partial=True)
                    case 3:
                        made = upload(client, first, f"a{number}")
                    case _:
                        made = update(client, first, f"a{number}")
                seen = client.post("/score", json=BODIES[0]).raise_for_status().json()
                assert seen["policy"]["version"] == made["current"]["version"]

        load.run_while(change)
        state = client.get("/policy").json()
    assert load.wrong == []
    assert load.num_right > NUM_UPDATES
    assert len(load.versions) > NUM_UPDATES // 2
    assert (state["current"]["version"], state["current"]["number"]) == (f"a{NUM_UPDATES}", NUM_UPDATES + 1)
    print(f"{load.num_right} right answers, of {len(load.versions)} versions")  # noqa: T201  # for reports


def test_a_refused_update_changes_nothing(
    cluster: str, expected: dict[str, list[Rewards]], checkpoints: list[Path]
) -> None:
    broken = checkpoints[0].with_name("broken")
    broken.mkdir()
    tensors = safetensors.torch.load_file(checkpoints[0] / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, broken / "model.safetensors")
    with client_of(cluster, "admin") as client:
        before = client.get("/policy").json()
        refused = client.post("/policy/update", json={"path": str(broken), "version": "x"}, timeout=300.0)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_weights")
        assert "NaN" in refused.json()["errors"][0]["message"]
        assert client.get("/policy").json() == before
        for body, rewards in zip(BODIES, expected["a"], strict=True):
            assert rewards_of(client.post("/score", json=body).json()) == rewards


def test_a_replaced_engine_has_the_current_version(
    cluster: str, checkpoints: list[Path], expected: dict[str, list[Rewards]]
) -> None:
    """All engines are replaced in turn: the coordinator still has the upload."""
    with client_of(cluster, "admin") as client:
        upload(client, checkpoints[1], "b-uploaded")
        update(client, checkpoints[1].with_name("part"), "c-part", partial=True)
        for victim in replica_pids():
            until(lambda: len(replica_pids()) == NUM_REPLICAS)
            os.kill(victim, signal.SIGKILL)
            until(lambda victim=victim: victim not in replica_pids())  # type: ignore[misc]
            until(lambda: len(replica_pids()) == NUM_REPLICAS)
        for _ in range(4):
            for body, rewards in zip(BODIES, expected["c"], strict=True):
                answered = client.post("/score", json={**body, "policy_version": "c-part"}).json()
                assert answered["groups"][0]["policy_version"] == "c-part"
                assert rewards_of(answered) == rewards


def test_a_demand_that_cannot_be_met_is_refused(cluster: str) -> None:
    with client_of(cluster) as client:
        past = client.post("/score", json={**BODIES[0], "policy_version": "a0"})
        coming = client.post("/score", json={**BODIES[0], "policy_version": {"at_least": 1000}})
    assert (past.status_code, "Retry-After" in past.headers) == (409, False)
    assert (coming.status_code, "Retry-After" in coming.headers) == (409, True)
