"""Open files of weights: anonymous ones of this process, and checkpoint files that others may change."""

import errno
import os
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shopr1_client.errors import StorageError
from shopr1_service.weights.paths import open_below

_SETTLED_S = 0.05
"""Longer than a step of any file system's clock: a later write gets another time."""
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""Errors of file systems that cannot reserve space."""
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY  # do not wait for a pipe, or take a terminal
Signature = tuple[int, int]
"""A file's size and modification time, ns."""
Identity = tuple[int, int, int, int]
"""A file's device, inode, size and modification time, ns."""
CLOSE_THREAD = "close"
"""Name of the threads that close anonymous files."""


@contextmanager
def storage_errors(content: str) -> Iterator[None]:
    """Errors of the disk are problems of `staging_dir`.

    Args:
        content: what is written there, for the message.

    Raises:
        StorageError: the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"{content} cannot be kept in staging_dir: {reason}") from error


class OpenFile:
    """Bytes on disk that several threads may read at once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # Not a file object: those warn when they are not closed explicitly.
        self._finalizer = weakref.finalize(self, self._close, fd)
        self._finalizer.atexit = False  # the system closes it then

    @property
    def is_intact(self) -> bool:
        """Whether it has not been written to."""
        return True

    @property
    def signature(self) -> Signature | None:
        """Identifies the content on other machines; None: no other machine has it."""
        return None

    @staticmethod
    def _close(fd: int) -> None:
        os.close(fd)

    def read_into(self, block: memoryview, start: int) -> None:
        """Fill a block from byte `start` on.

        Raises:
            OSError: the disk fails, or the file is too short.
        """
        while block:
            num_read = os.preadv(self._fd, [block], start)
            if not num_read:
                raise OSError(None, f"the file ends at byte {start}")
            start += num_read
            block = block[num_read:]


class AnonymousTempFile(OpenFile):
    """A file without a name: no other process can open it, and it vanishes with its last holder.

    Args:
        directory: on which file system; default: the system's for temporary files.
        content: what it is for, for error messages.

    Raises (every method but `read_into`):
        StorageError: the disk is full or fails.
    """

    def __init__(self, directory: Path | None = None, content: str = "the new weights") -> None:
        self._content = content
        with storage_errors(content):
            fd, path = tempfile.mkstemp(prefix="shopr1-", dir=directory)
            Path(path).unlink()
        super().__init__(fd)
        self.num_bytes = 0
        self._closing = threading.Lock()

    def reserve(self, num_bytes: int) -> None:
        """Make sure that there is room; writing is faster, too."""
        with storage_errors(self._content):
            try:
                os.posix_fallocate(self._fd, 0, max(1, num_bytes))
            except OSError as error:
                if error.errno not in _CANNOT_RESERVE:
                    raise

    def append(self, block: memoryview) -> int:
        """Write a block at the end; returns where it begins. From one thread at a time."""
        start = self.num_bytes
        with storage_errors(self._content), self._closing:
            if not self._finalizer.alive:  # another file may have its descriptor now
                raise OSError(None, "the update was given up")
            while block:
                num_written = os.pwrite(self._fd, block, self.num_bytes)
                self.num_bytes += num_written
                block = block[num_written:]
        return start

    def discard(self) -> None:
        """Free its space now instead of with its last holder. It cannot be used afterwards."""
        with self._closing:
            if self._finalizer.detach():
                os.close(self._fd)

    @staticmethod
    def _close(fd: int) -> None:
        # The last holder may be the engine, and freeing the space takes as long as writing some of it.
        try:
            threading.Thread(target=os.close, args=(fd,), name=CLOSE_THREAD).start()
        except RuntimeError:  # the interpreter ends, or there are too many threads
            os.close(fd)


class CheckpointFile(OpenFile):
    """A regular file that others may change, opened once. It may be deleted or renamed.

    Args:
        path: below one of the roots, without links.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """

    def __init__(self, path: Path, roots: Sequence[Path]) -> None:
        self.path = path
        super().__init__(open_below(path, roots, _FLAGS))
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(None, "not a regular file")
        changed_s = max(status.st_mtime, status.st_ctime)  # written, or moved here
        time.sleep(min(_SETTLED_S, max(0.0, _SETTLED_S - (time.time() - changed_s))))
        self.identity = _identity(os.fstat(self._fd))

    @property
    def num_bytes(self) -> int:
        return self.identity[2]

    @property
    def is_intact(self) -> bool:
        return _identity(os.fstat(self._fd)) == self.identity

    @property
    def signature(self) -> Signature:
        return self.identity[2:]

    def is_at(self, path: Path) -> bool:
        """Whether a path still leads to this file, which has not been written to."""
        try:
            return self.is_intact and _identity(path.stat()) == self.identity
        except OSError:
            return False

    def read(self, start: int, num_bytes: int) -> bytes:
        """Some of its bytes.

        Raises:
            OSError: the disk fails, or the file is too short.
        """
        block = bytearray(num_bytes)
        self.read_into(memoryview(block), start)
        return bytes(block)


class ListedDirectory(OpenFile):
    """A directory that others may change, opened and listed once.

    Args:
        path: below one of the roots, without links.

    Attributes:
        files: by name; None for a link to nothing.

    Raises (every method):
        OSError: it cannot be listed.
    """

    def __init__(self, path: Path, roots: Sequence[Path]) -> None:
        super().__init__(open_below(path, roots, os.O_RDONLY | os.O_DIRECTORY))
        self.files: Mapping[str, Identity | None] = {name: self._look_at(name) for name in self.names_now()}

    def names_now(self) -> list[str]:
        """Names of the files that it has by now."""
        return os.listdir(self._fd)  # noqa: PTH208  # by its descriptor

    def is_at(self, path: Path) -> bool:
        """Whether a path still leads to this directory."""
        try:
            return os.path.samestat(path.stat(), os.fstat(self._fd))
        except OSError:
            return False

    def _look_at(self, name: str) -> Identity | None:
        with suppress(OSError):
            return _identity(os.stat(name, dir_fd=self._fd))  # relative to it
        return None


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
