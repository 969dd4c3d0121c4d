"""Files of the rollout log: names, rotation, and disks that are full or not writable."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shopr1_service.errors import SettingsError
from shopr1_service.monitoring.rotating_jsonl import RotatingJsonl
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.rollout_files import FullDisk, contents, files


def jsonl(directory: Path, *, max_bytes: int = 10, max_files: int = 3) -> RotatingJsonl:
    return RotatingJsonl(directory, max_bytes=max_bytes, max_files=max_files)


def test_files_grow_to_their_size(tmp_path: Path) -> None:
    log = jsonl(tmp_path)
    for part in (b"1234\n", b"5678\n", b"9\n"):
        log.append(part)
    assert contents(tmp_path) == [b"1234\n5678\n", b"9\n"]


def test_lines_larger_than_a_file_get_a_file_of_their_own(tmp_path: Path) -> None:
    log = jsonl(tmp_path)
    for part in (b"1\n", b"a long line\nand another\n", b"2\n"):
        log.append(part)
    assert contents(tmp_path) == [b"1\n", b"a long line\nand another\n", b"2\n"]


def test_only_the_oldest_file_of_the_log_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "rollouts-mine.jsonl").write_text("mine")
    (tmp_path / "a").write_text("other")
    log = jsonl(tmp_path, max_bytes=2)
    for number in range(1, 6):
        log.append(b"%d\n" % number)
    assert contents(tmp_path) == [b"3\n", b"4\n", b"5\n", b"mine"]
    assert (tmp_path / "a").exists()


def test_a_restart_begins_a_new_file_whose_name_sorts_last(tmp_path: Path) -> None:
    (tmp_path / "rollouts-00000041-20990101T000000Z.jsonl").write_bytes(b"half a li")
    for part in (b"1\n", b"2\n"):
        log = jsonl(tmp_path)
        log.append(part)
        log.close()
    assert contents(tmp_path) == [b"half a li", b"1\n", b"2\n"]


def test_two_processes_share_a_directory(tmp_path: Path) -> None:
    one, other = jsonl(tmp_path), jsonl(tmp_path)
    for part in (b"1\n", b"2\n"):
        one.append(part)
        other.append(part)
    assert contents(tmp_path) == [b"1\n2\n", b"1\n2\n"]


def test_a_name_that_is_taken_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path).append(b"1\n")
    log = jsonl(tmp_path)
    # As if the other process had made its file just after this one looked.
    monkeypatch.setattr(log, "_known", list)
    log.append(b"2\n")
    assert contents(tmp_path) == [b"1\n", b"2\n"]


def test_no_partial_line_in_front_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = jsonl(tmp_path, max_bytes=100)
    log.append(b"first\n")
    disk = FullDisk(monkeypatch, num_free=3)
    with pytest.raises(OSError, match="No space left"):
        log.append(b"lost\n")
    assert contents(tmp_path) == [b"first\n"]
    disk.num_free = 100
    log.append(b"second\n")
    assert contents(tmp_path) == [b"first\nsecond\n"]


LIMITED = """
import resource, sys
from pathlib import Path
from shopr1_service.monitoring.rotating_jsonl import RotatingJsonl
log = RotatingJsonl(Path(sys.argv[1]), max_bytes=100, max_files=3)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 100))
log.append(b"first\\n")
try:
    log.append(b"too long\\n")
except OSError as error:
    print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
log.append(b"second\\n")
"""


def test_no_partial_line_at_a_system_limit(tmp_path: Path) -> None:
    # The system takes four more bytes, and then says no: in a process of its own, as it is for all its files.
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, check=True)
    assert int(done.stdout) == errno.EFBIG
    assert contents(tmp_path) == [b"first\nsecond\n"]


def test_a_file_that_cannot_be_cut_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int, _length: int) -> None:
        raise OSError(errno.EIO, "cannot")

    log = jsonl(tmp_path, max_bytes=100)
    disk = FullDisk(monkeypatch, num_free=3)
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(OSError, match="No space left"):
        log.append(b"lost\n")
    disk.num_free = 100
    log.append(b"whole\n")
    assert contents(tmp_path) == [b"los", b"whole\n"]


def test_writing_continues_after_file_or_directory_was_deleted(tmp_path: Path) -> None:
    directory = tmp_path / "log"
    log = jsonl(directory, max_bytes=100)
    log.append(b"1\n")
    for path in files(directory):
        path.unlink()
    log.append(b"2\n")
    assert contents(directory) == [b"2\n"]
    for path in files(directory):
        path.unlink()
    directory.rmdir()
    log.append(b"3\n")
    assert contents(directory) == [b"3\n"]


@pytest.mark.parametrize("where", ["file/log", "/proc/log", "/proc/self"])
def test_a_directory_that_is_not_writable_is_an_error_at_start(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="rollout_log: cannot write into"):
        create_app(Settings(rollout_log=tmp_path / where), LocalEngine.opener(FakePolicy))


def test_a_directory_is_made(tmp_path: Path) -> None:
    create_app(Settings(rollout_log=tmp_path / "a" / "b"), LocalEngine.opener(FakePolicy))
    assert list((tmp_path / "a" / "b").iterdir()) == []
