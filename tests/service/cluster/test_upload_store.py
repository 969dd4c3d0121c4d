"""Uploads in the coordinator: written and read in chunks, deleted when no engine needs them."""

import errno
from pathlib import Path

import pytest

from shopr1_client.errors import NotFoundError, StorageError
from shopr1_service.cluster.upload_store import UploadStore
from shopr1_service.weights.files import AnonymousTempFile

pytestmark = pytest.mark.anyio


async def test_chunks_are_read_back(tmp_path: Path) -> None:
    store = UploadStore(tmp_path)
    upload, other = store.create(), store.create()
    for chunk in (b"abc", b"", b"defg"):
        await store.append(upload, chunk)
    assert [await store.read(upload, start, 3) for start in (0, 3, 6, 7, 99)] == [
        b"abc",
        b"def",
        b"g",
        b"",
        b"",
    ]
    assert await store.read(other, 0, 3) == b""


async def test_complete_uploads_are_deleted_when_they_are_not_needed(tmp_path: Path) -> None:
    store = UploadStore(tmp_path)
    needed, complete, incomplete = (store.create() for _ in range(3))
    for upload in (needed, complete):
        store.complete(upload)
    store.prune({needed})
    assert len(store) == 2
    for upload in (needed, incomplete):
        await store.read(upload, 0, 1)
    with pytest.raises(NotFoundError, match="not stored any more"):
        await store.append(complete, b"x")
    store.delete(needed)
    store.delete(needed)
    with pytest.raises(NotFoundError):
        store.complete(needed)


async def test_an_abandoned_upload_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = UploadStore(tmp_path)
    store.create()
    monkeypatch.setattr("shopr1_service.cluster.upload_store._IDLE_S", -1.0)
    store.prune(())
    assert len(store) == 0


async def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = UploadStore(tmp_path)
    upload = store.create()
    await store.append(upload, b"x")
    monkeypatch.setattr("os.pwrite", fail)
    monkeypatch.setattr(AnonymousTempFile, "read_into", fail)
    with pytest.raises(StorageError, match="cannot be kept in staging_dir: No space left"):
        await store.append(upload, b"x")
    with pytest.raises(StorageError, match="cannot be read again: No space left"):
        await store.read(upload, 0, 1)
    with pytest.raises(StorageError):
        UploadStore(tmp_path / "missing").create()
