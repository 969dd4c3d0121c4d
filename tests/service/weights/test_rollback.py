"""Backup of the weights that are loaded."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shopr1_client.errors import StorageError
from shopr1_service.weights.files import AnonymousTempFile
from shopr1_service.weights.rollback import WeightBackup
from shopr1_service.weights.tensors import TensorLocation, Weights
from tests.support.models import one_thread, tiny_model
from tests.support.staging import full_disk, staged
from tests.support.updating import HEAD, NORM, changed_model, staged_files, weights_of


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_rollback_after_any_updates(tmp_path: Path) -> None:
    """Each is loaded in part, rolled back, then loaded; rollback always restores the last state."""
    model = tiny_model()
    kept = Weights(model)
    backup = WeightBackup(kept, tmp_path)
    for seed, prefix in ((1, "model.layers.1."), (2, ""), (3, "model.layers."), (4, HEAD)):
        former = weights_of(model)
        stored = staged(model, *weights_of(changed_model(seed), prefix).items())
        backup.save(stored)
        some = dict(itertools.islice(stored.items(), len(stored) // 2 + 1))
        kept.load(some, lambda: None)
        assert any(not torch.equal(former[name], kept.tensors[name]) for name in some)
        backup.restore(stored, lambda: None)
        assert all(torch.equal(former[name], tensor) for name, tensor in kept.tensors.items())
        kept.load(stored, lambda: None)
        backup.record(stored)
    assert list(tmp_path.iterdir()) == []


def test_the_files_of_an_update_are_its_backup(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    kept = Weights(model)
    backup = WeightBackup(kept, None)
    written: list[str] = []
    store = kept.store

    def recording(names: Any, file: AnonymousTempFile) -> dict[str, TensorLocation]:
        written.extend(names)
        return store(names, file)

    monkeypatch.setattr(kept, "store", recording)
    for names, expected in (((NORM,), [NORM]), ((NORM, HEAD), [HEAD]), ((HEAD,), [])):
        stored = staged(model, *((name, torch.ones_like(kept.tensors[name])) for name in names))
        written.clear()
        backup.save(backup.missing(names))
        assert written == expected
        backup.record(stored)


def test_old_files_are_closed() -> None:
    model = tiny_model()
    backup = WeightBackup(Weights(model), None)
    before = staged_files()
    for _ in range(5):
        stored = staged(model, *weights_of(changed_model()).items())
        backup.save(stored)
        backup.record(stored)
        del stored
        assert len(staged_files() - before) == 1


@pytest.fixture
def _full(monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch)


@pytest.mark.usefixtures("_full")
def test_a_full_disk_for_old_weights() -> None:
    kept = Weights(tiny_model())
    backup, before = WeightBackup(kept, None), staged_files()
    with pytest.raises(StorageError, match="the old weights cannot be kept in staging_dir: No space left"):
        backup.save(list(kept.tensors))
    assert not staged_files() - before


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        WeightBackup(Weights(tiny_model()), tmp_path / "none").save([NORM])
