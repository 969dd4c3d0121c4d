"""Checkpoints that their trainer writes to, replaces or deletes while the service needs them."""

import itertools
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from shopr1_service.weights.checkpoint import CheckpointDirectory, Shard
from shopr1_service.weights.files import CheckpointFile
from shopr1_service.weights.staging import StagedWeights
from tests.support.http import WAIT_S, metric, problem
from tests.support.models import one_thread
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

    def hang(_file: CheckpointFile, path: Path) -> None:
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
