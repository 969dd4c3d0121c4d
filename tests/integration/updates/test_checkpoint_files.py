"""Checkpoints that their trainer goes on writing to, replaces or deletes while the service needs them."""

import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from shopr1_service.weights.files import CheckpointFile
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
    """Do something when all has been checked, and nothing is exchanged yet."""
    keep = service.policy.way_back.keep

    def acting(names: Any) -> None:
        act()
        keep(names)

    patch.setattr(service.policy.way_back, "keep", acting)


@pytest.mark.parametrize("is_torn", [False, True])
async def test_weights_that_change_after_the_check(
    service: Service, tmp_path: Path, is_torn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(saved(tmp_path / "new", changed_model())) / "model.safetensors"
    other = file_of(changed_model(2))

    def write() -> None:
        file.write_bytes(other[: len(other) // 2] if is_torn else other)

    service.policy.way_back.keep(list(service.policy.weights.tensors))
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


@pytest.mark.parametrize("fate", ["left", "deleted", "replaced", "overwritten"])
async def test_the_way_back_to_a_checkpoint(service: Service, tmp_path: Path, fate: str) -> None:
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


async def test_the_way_back_was_overwritten_at_the_last_moment(service: Service, tmp_path: Path) -> None:
    file = Path(saved(tmp_path / "new", changed_model())) / "model.safetensors"
    done(await service.update("new", "1"))
    names = list(service.policy.weights.tensors)
    assert service.policy.way_back.missing(names) == []
    file.write_bytes(file.read_bytes())
    with pytest.raises(OSError, match="was written to"):
        service.policy.way_back.restore(names, lambda: None)
    assert await service.numbers() == await numbers_of(changed_model())


# --- file systems that hang -------------------------------------------------------------------------


@contextmanager
def hanging(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever opens a file of weights waits until this ends."""
    is_over = threading.Event()

    def hang(path: Path) -> Any:
        assert is_over.wait(WAIT_S)
        raise FileNotFoundError(path)

    with patch.context() as inner:
        for module in ("updates", "adapter_updates"):
            inner.setattr(f"shopr1_service.{module}.open_regular", hang)
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


async def test_the_way_back_does_not_lead_to_a_disk_that_hangs(
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


async def test_a_read_that_is_given_up_ends_when_it_can(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "new", changed_model())
    is_over, reads = threading.Event(), []
    original = CheckpointFile.read_into

    def hang(file: CheckpointFile, *place: Any) -> None:
        reads.append(place)
        assert is_over.wait(WAIT_S)
        original(file, *place)

    monkeypatch.setattr(CheckpointFile, "read_into", hang)
    give_up_soon(monkeypatch, service)
    problem(await service.update("new"), 507, "storage")
    num_begun = len(reads)
    is_over.set()
    for thread in threading.enumerate():
        if thread.name == "foreign-read":
            thread.join(WAIT_S)
    assert len(reads) == num_begun


def test_a_file_that_was_just_written_is_looked_at_when_its_time_has_passed(tmp_path: Path) -> None:
    for _ in range(20):  # within one step of the file system's clock
        (tmp_path / "file").write_bytes(b"old")
        with (tmp_path / "file").open("rb") as file:
            foreign = CheckpointFile(file)
        assert foreign.is_intact
        (tmp_path / "file").write_bytes(b"new")
        assert not foreign.is_intact
