"""Checkpoints that their trainer writes to, replaces or deletes while the service needs them."""

import functools
import itertools
import os
import random
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from shopr1_service.weights.checkpoint import CheckpointDirectory, Shard
from shopr1_service.weights.files import CheckpointFile, ListedDirectory
from shopr1_service.weights.staging import StagedWeights
from tests.support.http import WAIT_S, metric, problem
from tests.support.models import one_thread, tiny_model
from tests.support.staging import check_equal
from tests.support.updating import (
    HEAD,
    HUGE,
    Service,
    Unchanged,
    changed_model,
    done,
    file_of,
    flaws,
    numbers_of,
    saved,
    saved_adapter,
    updatable,
    weights_of,
)

pytestmark = pytest.mark.anyio

INFINITE = file_of({**weights_of(changed_model(7)), HEAD: torch.full((389, 32), HUGE)})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with updatable(policy_roots=(tmp_path,)) as service:
        yield service


def before_the_swap(patch: pytest.MonkeyPatch, service: Service, act: Callable[[], object]) -> None:
    """Do something after all checks."""
    save = service.policy.backup.save

    def acting(names: Any) -> None:
        act()
        save(names)

    patch.setattr(service.policy.backup, "save", acting)


@pytest.mark.parametrize("is_torn", [False, True])
async def test_weights_that_change_after_the_check(
    service: Service, tmp_path: Path, is_torn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(saved(tmp_path / "new", changed_model())) / "model.safetensors"
    other = file_of(changed_model(2))

    def write() -> None:
        file.write_bytes(other[: len(other) // 2] if is_torn else other)

    service.policy.backup.save(list(service.policy.weights.tensors))
    async with Unchanged(service):
        with monkeypatch.context() as patch:
            before_the_swap(patch, service, write)
            refused = await service.update("new")
        assert "was written to" in problem(refused, 422, "invalid_weights")["detail"]
    file.write_bytes(other)
    done(await service.update("new"))
    assert await service.numbers() == await numbers_of(changed_model(2))


async def test_weights_that_are_deleted_after_the_check(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path / "new", changed_model())
    with monkeypatch.context() as patch:
        before_the_swap(patch, service, lambda: shutil.rmtree(directory))
        done(await service.update("new"))
    assert await service.numbers() == await numbers_of(changed_model())


# --- files that are replaced while they are read ----------------------------------------------------


def between_headers_and_tensors(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    refer = StagedWeights.refer

    def acting(staged: StagedWeights, shards: Any) -> None:
        act()
        refer(staged, shards)

    patch.setattr(StagedWeights, "refer", acting)


@pytest.mark.parametrize("fate", ["replaced", "deleted", "overwritten"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
async def test_files_that_change_between_headers_and_tensors(
    service: Service, tmp_path: Path, name: str, fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(saved(tmp_path / "new", changed_model())) / name
    other = Path(saved(tmp_path / "other", changed_model(2))) / name

    def act() -> None:
        match fate:
            case "replaced":
                other.rename(file)
            case "deleted":
                file.unlink()
            case "overwritten":
                file.write_bytes(other.read_bytes())

    async with Unchanged(service):
        with monkeypatch.context() as patch:
            between_headers_and_tensors(patch, act)
            found = flaws(await service.update("new"))
    assert found == {name: f"{name} was replaced or written to while it was read"}


async def test_adapter_files_that_change_while_they_are_read(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path(saved_adapter(tmp_path / "lora")) / "adapter_config.json"
    shard = CheckpointDirectory.shard

    def replacing(directory: CheckpointDirectory, name: str) -> Shard:
        (tmp_path / "other").write_text(config.read_text())
        (tmp_path / "other").rename(config)
        return shard(directory, name)

    async with Unchanged(service):
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointDirectory, "shard", replacing)
            found = flaws(await service.load_adapter("lora", "lora"))
    assert found.keys() == {"adapter_config.json"}
    done(await service.load_adapter("lora", "lora"))


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
async def test_checkpoints_are_not_mixed(service: Service, tmp_path: Path, max_shard_size: str) -> None:
    """A trainer replaces the files, one after another, again and again: an update gets one save, or fails."""
    models = [changed_model(1), changed_model(2)]
    paths = [
        Path(saved(tmp_path / f"{i}", model, max_shard_size=max_shard_size)) for i, model in enumerate(models)
    ]
    weights = [{path.name: path.read_bytes() for path in path.glob("model*")} for path in paths]
    latest = Path(saved(tmp_path / "latest", models[0], max_shard_size=max_shard_size))
    is_over = threading.Event()

    def save_again() -> None:
        for number in itertools.count():
            for name, content in weights[number % 2].items():
                (tmp_path / "part").write_bytes(content)
                (tmp_path / "part").rename(latest / name)
            if is_over.wait(0.02):
                return

    expected = [await numbers_of(model) for model in models]
    trainer = threading.Thread(target=save_again)
    trainer.start()
    try:
        for number in range(20):
            response = await service.update("latest", f"{number}")
            if response.status_code == 200:
                service.forget_prompts()
                assert await service.numbers() in expected
            else:
                assert "while it was read" in problem(response, 422, "invalid_weights")["detail"]
    finally:
        is_over.set()
        trainer.join()
    done(await service.update("latest"))
    assert await service.numbers() in expected


class Steps:
    """Actions at chosen steps of an update: whenever it lists, looks for, opens or reads files."""

    def __init__(
        self, patch: pytest.MonkeyPatch, actions: Sequence[tuple[int, Callable[[], object]]]
    ) -> None:
        self.num_steps = 0
        self._left = sorted(actions, key=lambda each: each[0])
        self._lock = threading.Lock()
        for owner, name in [
            (ListedDirectory, "names_now"),
            (ListedDirectory, "is_at"),
            (CheckpointDirectory, "has"),
            (CheckpointFile, "__init__"),
            (CheckpointFile, "read_into"),
            (CheckpointFile, "is_at"),
        ]:
            patch.setattr(owner, name, self._stepping(getattr(owner, name)))

    def _stepping(self, method: Any) -> Any:
        def stepping(*args: Any) -> Any:
            result = method(*args)
            self._take()
            return result

        return stepping

    def _take(self) -> None:
        with self._lock:  # several threads read
            self.num_steps += 1
            while self._left and self._left[0][0] <= self.num_steps:
                self._left.pop(0)[1]()


NUM_PLANS = 60


async def test_every_order_of_replacements(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are replaced one after the other, each at any step of an update, in any order, all or some.

    Afterwards the policy has the weights of exactly one save, or those of before if the update was refused.
    """
    models = {"old": changed_model(1), "new": changed_model(2)}
    for name, model in models.items():
        saved(tmp_path / name, model, max_shard_size="60KB")
    names = sorted(path.name for path in (tmp_path / "new").glob("model*"))
    assert len(names) > 3  # an index and several shards
    with monkeypatch.context() as patch:
        steps = Steps(patch, [])
        done(await service.update("old", "first"))
    outcomes, rng = set(), random.Random(19)
    for number in range(NUM_PLANS):
        latest, source = tmp_path / f"latest-{number}", tmp_path / f"source-{number}"
        shutil.copytree(tmp_path / "old", latest)
        shutil.copytree(tmp_path / "new", source)
        done(await service.upload(file_of(tiny_model()), "before"))
        chosen = rng.sample(names, rng.randint(1, len(names)))
        actions = [
            # Also after the last step, in which the weights are loaded.
            (rng.randint(1, steps.num_steps + 3), functools.partial((source / name).rename, latest / name))
            for name in chosen
        ]
        with monkeypatch.context() as patch:
            Steps(patch, actions)
            response = await service.update(latest.name, f"{number}")
        if response.status_code == 200:
            check_equal(service.policy.model, models["old"])
        else:
            assert "replaced" in problem(response, 422, "invalid_weights")["detail"]
            check_equal(service.policy.model, tiny_model())
        outcomes.add(response.status_code)
    assert outcomes == {200, 422}


@pytest.mark.parametrize("is_torn", [False, True])
async def test_weights_that_change_with_their_time_set_back(
    service: Service, tmp_path: Path, is_torn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file system may show it that keeps times for a while: only the numbers tell."""
    file = Path(saved(tmp_path / "new", changed_model())) / "model.safetensors"
    status, other = file.stat(), file_of(changed_model(2), format="pt")
    assert status.st_size == len(other)

    def write() -> None:
        with file.open("r+b") as stream:
            stream.write(other[: len(other) // 2] if is_torn else other)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    service.policy.backup.save(list(service.policy.weights.tensors))
    async with Unchanged(service):
        with monkeypatch.context() as patch:
            before_the_swap(patch, service, write)
            found = flaws(await service.update("new"))
    [(name, message)] = found.items()
    assert message == f"{name} was written to after it was checked"
    done(await service.upload(file_of(changed_model(3))))


async def test_rollback_to_a_checkpoint_with_its_time_set_back(service: Service, tmp_path: Path) -> None:
    """A rollback to other numbers than those of before would be worse than none."""
    file = Path(saved(tmp_path / "new", changed_model())) / "model.safetensors"
    done(await service.update("new", "1"))
    status = file.stat()
    file.write_bytes(file_of(changed_model(2), format="pt"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    names = list(service.policy.weights.tensors)
    assert service.policy.backup.missing(names) == []
    with pytest.raises(OSError, match="has other numbers now"):
        service.policy.backup.restore(names, lambda: None)


async def test_adapter_that_is_replaced_at_any_step(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(saved_adapter(tmp_path / "lora")) / "adapter_model.safetensors"
    other = Path(saved_adapter(tmp_path / "other", seed=5)) / file.name
    contents, expected = [file.read_bytes(), other.read_bytes()], []
    with monkeypatch.context() as patch:
        steps = Steps(patch, [])
        for name in ("lora", "other"):
            done(await service.load_adapter(name, name))
            expected.append(await service.numbers(adapter=name))
    statuses = []
    for step in range(1, steps.num_steps // 2 + 1):
        file.write_bytes(contents[0])
        (tmp_path / "part").write_bytes(contents[1])
        with monkeypatch.context() as patch:
            Steps(patch, [(step, functools.partial((tmp_path / "part").rename, file))])
            response = await service.load_adapter("a", "lora")
        statuses.append(response.status_code)
        if response.status_code == 200:  # before anything was read of it, or after all was
            assert await service.numbers(adapter="a") in expected
        else:
            assert flaws(response).keys() == {file.name}
    # All but those before the directory was listed, and after the file was looked at for the last time.
    assert set(statuses[1:-3]) == {422}


@pytest.mark.parametrize("fate", ["left", "deleted", "replaced", "overwritten"])
async def test_rollback_to_a_checkpoint(service: Service, tmp_path: Path, fate: str) -> None:
    directory = Path(saved(tmp_path / "new", changed_model()))
    file = directory / "model.safetensors"
    done(await service.update("new", "1"))
    match fate:
        case "deleted":
            shutil.rmtree(directory)
        case "replaced":
            (tmp_path / "other").write_bytes(file_of(changed_model(2)))
            (tmp_path / "other").rename(file)
        case "overwritten":
            file.write_bytes(file_of(changed_model(2)))
    for _ in range(2):  # the second time over what the first one left
        problem(await service.upload(INFINITE, "2"), 422, "invalid_weights")
        service.forget_prompts()
        assert await service.numbers() == await numbers_of(changed_model())
    assert (await service.state())["current"]["version"] == "1"


async def test_a_backup_that_was_overwritten_at_the_last_moment(service: Service, tmp_path: Path) -> None:
    file = Path(saved(tmp_path / "new", changed_model())) / "model.safetensors"
    done(await service.update("new", "1"))
    names = list(service.policy.weights.tensors)
    assert service.policy.backup.missing(names) == []
    file.write_bytes(file.read_bytes())
    with pytest.raises(OSError, match="was written to"):
        service.policy.backup.restore(names, lambda: None)
    assert await service.numbers() == await numbers_of(changed_model())


# --- file systems that hang -------------------------------------------------------------------------


@contextmanager
def hanging(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Opening a checkpoint's file takes as long as this lasts."""
    is_over = threading.Event()

    def hang(_file: CheckpointFile, path: Path, _roots: Any) -> None:
        assert is_over.wait(WAIT_S)
        raise FileNotFoundError(path)

    with patch.context() as inner:
        inner.setattr(CheckpointFile, "__init__", hang)
        try:
            yield
        finally:
            is_over.set()


def give_up_soon(patch: pytest.MonkeyPatch, service: Service) -> None:
    engine = service.app.state.shopr1.engine
    for changes in (engine.weights, engine.adapters):
        patch.setattr(changes, "_read_timeout_s", 0.05)


async def test_reads_that_never_return(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "new", changed_model())
    saved_adapter(tmp_path / "lora")
    # More of them than the event loop has threads of its own.
    num_tries = min(32, (os.cpu_count() or 1) + 4) + 1
    give_up_soon(monkeypatch, service)
    with hanging(monkeypatch):
        async with Unchanged(service):
            for _ in range(num_tries):
                refused = await service.update("new")
                assert "within read_timeout_s = 0.05 s" in problem(refused, 507, "storage")["detail"]
            problem(await service.load_adapter("lora", "lora"), 507, "storage")
        reads = [thread for thread in threading.enumerate() if thread.name == "foreign-read"]
        assert len(reads) == num_tries + 1
        assert all(read.daemon for read in reads)  # the process ends without them
        done(await service.upload(file_of(changed_model(2)), "1"))
    name, labels = "shopr1_policy_updates_total", {"source": "checkpoint", "outcome": "failed"}
    assert await metric(service.http, name, **labels) == num_tries
    assert await service.numbers() == await numbers_of(changed_model(2))


async def test_a_backup_on_a_disk_that_hangs_is_not_used(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "new", changed_model())
    done(await service.update("new", "1"))
    is_over = threading.Event()
    monkeypatch.setattr(CheckpointFile, "is_intact", property(lambda _: is_over.wait(WAIT_S)))
    give_up_soon(monkeypatch, service)
    try:
        problem(await service.upload(INFINITE, "2"), 422, "invalid_weights")
        service.forget_prompts()
        assert await service.numbers() == await numbers_of(changed_model())
        done(await service.upload(file_of(changed_model(2)), "2"))
    finally:
        is_over.set()


async def test_an_abandoned_read_ends_as_soon_as_it_can(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "new", changed_model())
    is_over, reads = threading.Event(), []
    original = CheckpointFile.read_into

    def hang(file: CheckpointFile, *place: Any) -> None:
        reads.append(place)
        assert is_over.wait(WAIT_S)
        original(file, *place)

    between_headers_and_tensors(monkeypatch, lambda: monkeypatch.setattr(CheckpointFile, "read_into", hang))
    give_up_soon(monkeypatch, service)
    problem(await service.update("new"), 507, "storage")
    num_begun = len(reads)
    is_over.set()
    for thread in threading.enumerate():
        if thread.name == "foreign-read":
            thread.join(WAIT_S)
    assert len(reads) == num_begun
