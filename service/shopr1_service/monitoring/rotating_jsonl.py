"""Files of JSON lines that grow to a size, of which the newest are kept.

    rollouts-00000017-20261125T154023Z.jsonl

The number grows by one from file to file, across restarts too: names sort as the files were begun, also where
a clock was set back. A process begins files of its own and never opens one that exists: several may share a
directory, and what was cut off by a crash is never written on.

`logging.handlers.RotatingFileHandler` renames files when it rotates, so that no name stays, and leaves half a
line where a disk is full.
"""

import os
import re
from datetime import UTC, datetime
from os import write  # by itself, so that tests can put a full disk in its place
from pathlib import Path

from shopr1_service.errors import SettingsError

_NAME = re.compile(r"rollouts-(\d{8,})-\d{8}T\d{6}Z\.jsonl")
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
_MODE = 0o640


class JsonlFiles:
    """See the module. Used from one thread.

    Args:
        max_bytes: a file is full when the next lines would make it larger.
        max_files: how many are kept; older ones are deleted when a new one is begun.

    Raises:
        SettingsError: the directory cannot be made, or no file can be written there.
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
            OSError: they could not be written; then nothing of them stays in front of what comes next.
        """
        descriptor = self._open_for(len(lines))
        try:
            _write(descriptor, lines)
        except OSError:
            self._take_back()
            raise
        self._num_bytes += len(lines)

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _open_for(self, num_bytes: int) -> int:
        """The file that has room for so much; a new one if there is none, or if somebody has deleted it."""
        if self._descriptor is not None:
            is_full = self._num_bytes > 0 and self._num_bytes + num_bytes > self._max_bytes
            if not is_full and os.fstat(self._descriptor).st_nlink > 0:
                return self._descriptor
            self.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        known = self._known()
        for _, old in known[: max(0, len(known) + 1 - self._max_files)]:
            old.unlink(missing_ok=True)
        self._descriptor = self._begin(known[-1][0] + 1 if known else 1)
        self._num_bytes = 0
        return self._descriptor

    def _known(self) -> list[tuple[int, Path]]:
        """The files that are there with their numbers, the oldest first."""
        matches = [(_NAME.fullmatch(path.name), path) for path in self._directory.iterdir()]
        return sorted((int(match[1]), path) for match, path in matches if match)

    def _begin(self, number: int) -> int:
        while True:
            name = f"rollouts-{number:08d}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.jsonl"
            try:
                return os.open(self._directory / name, _FLAGS, _MODE)
            except FileExistsError:  # another process was faster
                number += 1

    def _take_back(self) -> None:
        """Cut off what was written of lines that did not fit; if that fails too, the file is given up."""
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, self._num_bytes)
        except OSError:
            self.close()


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:  # a disk that is nearly full takes a part, and says so only at the next try
        view = view[write(descriptor, view) :]


def _probe(directory: Path) -> None:
    """Find out now, and not with the first rollout, whether a file can be made."""
    name = directory / f".probe-{os.getpid()}"
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT, _MODE))
    name.unlink()
