"""Files of JSON lines that grow to a maximum size; the newest ones are kept.

    rollouts-00000017-20261125T154023Z.jsonl

The number grows by one from file to file, also across restarts: names sort by age even if the clock was set
back. A process creates its own files and never opens an existing one, so several can share a directory, and
nothing is appended to a line that a crash cut off.

`logging.handlers.RotatingFileHandler` does not do: it renames files when it rotates, appends to the file of
the last process, and leaves half a line in front of the next one when the disk is full.
"""

import os
import re
from datetime import UTC, datetime
from os import write  # a name of this module, which tests replace by a full disk
from pathlib import Path

from shopr1_service.errors import SettingsError

_NAME = re.compile(r"rollouts-(\d{8,})-\d{8}T\d{6}Z\.jsonl")
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
_MODE = 0o640


class RotatingJsonl:
    """Writer of rotating files. Used from one thread.

    Args:
        max_bytes: a file is full when the next lines would make it larger.
        max_files: number of files to keep; older ones are deleted when a new one is created.

    Raises:
        SettingsError: the directory cannot be created, or no file can be written there.
    """

    def __init__(self, directory: Path, *, max_bytes: int, max_files: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._descriptor: int | None = None
        self._num_bytes = 0
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            _probe(directory)
        except OSError as error:
            raise SettingsError(f"rollout_log: cannot write into {str(directory)!r}: {error}") from error

    def append(self, lines: bytes) -> None:
        """Write lines that belong together, into one file.

        Raises:
            OSError: they could not be written. No part of them stays in front of the next lines.
        """
        descriptor = self._open_for(len(lines))
        try:
            _write(descriptor, lines)
        except OSError:
            self._truncate()
            raise
        self._num_bytes += len(lines)

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _open_for(self, num_bytes: int) -> int:
        """The current file if it has room and still exists, else a new one."""
        if self._descriptor is not None:
            is_full = self._num_bytes > 0 and self._num_bytes + num_bytes > self._max_bytes
            if not is_full and os.fstat(self._descriptor).st_nlink > 0:
                return self._descriptor
            self.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        known = self._known()
        for _, old in known[: max(0, len(known) + 1 - self._max_files)]:
            old.unlink(missing_ok=True)
        self._descriptor = self._create(known[-1][0] + 1 if known else 1)
        self._num_bytes = 0
        return self._descriptor

    def _known(self) -> list[tuple[int, Path]]:
        """Existing files with their numbers, the oldest first."""
        matches = [(_NAME.fullmatch(path.name), path) for path in self._directory.iterdir()]
        return sorted((int(match[1]), path) for match, path in matches if match)

    def _create(self, number: int) -> int:
        while True:
            name = f"rollouts-{number:08d}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.jsonl"
            try:
                return os.open(self._directory / name, _FLAGS, _MODE)
            except FileExistsError:  # of another process
                number += 1

    def _truncate(self) -> None:
        """Cut off lines that were written in part; if that fails too, close the file."""
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, self._num_bytes)
        except OSError:
            self.close()


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:  # a nearly full disk accepts a part, and fails only at the next write
        view = view[write(descriptor, view) :]


def _probe(directory: Path) -> None:
    """Create and delete a file, to fail at start and not at the first rollout."""
    name = directory / f".probe-{os.getpid()}"
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT, _MODE))
    name.unlink()
