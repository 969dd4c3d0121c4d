"""Anonymous files, and checkpoint files that others write to."""

import errno
import os
import time
from pathlib import Path

import pytest

from shopr1_client.errors import StorageError
from shopr1_service.weights.files import AnonymousTempFile, CheckpointFile, ListedDirectory, storage_errors
from tests.support.updating import staged_files


def test_an_anonymous_file_vanishes_with_its_holder(tmp_path: Path) -> None:
    before = staged_files()
    file = AnonymousTempFile(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert [file.append(memoryview(block)) for block in (b"ab", b"", b"cde")] == [0, 2, 2]
    assert file.num_bytes == 5
    block = bytearray(3)
    file.read_into(memoryview(block), 1)
    assert block == b"bcd"
    with pytest.raises(OSError, match="the file ends at byte 5"):
        file.read_into(memoryview(block), 3)
    assert len(staged_files() - before) == 1
    del file
    assert not staged_files() - before


def test_a_discarded_file_is_closed_once() -> None:
    before = staged_files()
    file = AnonymousTempFile()
    file.discard()
    assert not staged_files() - before
    with open(os.devnull, "rb") as other:  # noqa: PTH123  # takes the number of the one that was closed
        file.discard()
        del file
        assert other.read() == b""


def test_partial_writes_and_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that is nearly full, and for more than 2 GiB at once."""
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, block, start: pwrite(fd, block[:3], start))
    monkeypatch.setattr(os, "preadv", lambda fd, blocks, start: preadv(fd, [blocks[0][:2]], start))
    file, block = AnonymousTempFile(), bytearray(10)
    file.append(memoryview(b"0123456789"))
    file.read_into(memoryview(block), 0)
    assert block == b"0123456789"


def test_a_file_that_was_just_written_is_opened_when_its_time_has_passed(tmp_path: Path) -> None:
    for _ in range(20):  # within one step of the file system's clock
        (tmp_path / "file").write_bytes(b"old")
        file = CheckpointFile(tmp_path / "file", [tmp_path])
        assert file.is_intact
        (tmp_path / "file").write_bytes(b"new")
        assert not file.is_intact


def test_a_file_that_was_just_moved_there_is_opened_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own time may be an old one; the others of its checkpoint may be on their way."""
    (tmp_path / "old").write_bytes(b"old")
    os.utime(tmp_path / "old", (0, 0))
    (tmp_path / "old").rename(tmp_path / "file")
    waits_s = list[float]()
    monkeypatch.setattr(time, "time", (tmp_path / "file").stat().st_ctime.__float__)
    monkeypatch.setattr(time, "sleep", waits_s.append)
    CheckpointFile(tmp_path / "file", [tmp_path])
    assert waits_s == [pytest.approx(0.05)]


def test_a_directory_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "broken").symlink_to("nothing")
    directory = ListedDirectory(tmp_path, [tmp_path])
    file = CheckpointFile(tmp_path / "file", [tmp_path])
    assert directory.files == {"file": file.identity, "link": file.identity, "broken": None}
    (tmp_path / "new").touch()
    assert directory.files.keys() == {"file", "link", "broken"}
    assert set(directory.names_now()) == {"file", "link", "broken", "new"}
    assert directory.is_at(tmp_path)
    assert not directory.is_at(tmp_path.parent)
    assert not directory.is_at(tmp_path / "nothing")


def test_errors_of_the_disk_are_those_of_storage() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = "^weights cannot be kept in staging_dir: No space left on device$"
    with pytest.raises(StorageError, match=message), storage_errors("weights"):
        raise full
