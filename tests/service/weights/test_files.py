"""Anonymous files, and checkpoint files that others write to."""

import os
from pathlib import Path

import pytest

from shopr1_service.weights.files import AnonymousTempFile, CheckpointFile
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
        file = CheckpointFile(tmp_path / "file")
        assert file.is_intact
        (tmp_path / "file").write_bytes(b"new")
        assert not file.is_intact
