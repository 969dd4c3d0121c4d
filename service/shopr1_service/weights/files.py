"""Open files of weights: anonymous ones of this process, and checkpoint files that others may change."""

import errno
import os
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shopr1_client.errors import StorageError

_SETTLED_S = 0.05
"""Longer than a step of any file system's clock: a later write gets another time."""
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""Errors of file systems that cannot reserve space."""
# Do not wait for a pipe, take a terminal, or follow a link that was put there after the path was resolved.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
Signature = tuple[int, int]
"""A file's size and modification time, ns."""
CLOSE_THREAD = "close"
"""Name of the threads that close anonymous files."""


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
        with self._storage_errors():
            fd, path = tempfile.mkstemp(prefix="shopr1-", dir=directory)
            Path(path).unlink()
        super().__init__(fd)
        self.num_bytes = 0
        self._closing = threading.Lock()

    def reserve(self, num_bytes: int) -> None:
        """Make sure that there is room; writing is faster, too."""
        with self._storage_errors():
            try:
                os.posix_fallocate(self._fd, 0, max(1, num_bytes))
            except OSError as error:
                if error.errno not in _CANNOT_RESERVE:
                    raise

    def append(self, block: memoryview) -> int:
        """Write a block at the end; returns where it begins. From one thread at a time."""
        start = self.num_bytes
        with self._storage_errors(), self._closing:
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

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"{self._content} cannot be kept in staging_dir: {reason}") from error


class CheckpointFile(OpenFile):
    """A regular file that others may change, opened once. It may be deleted or renamed.

    Args:
        path: without links.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(os.open(path, _FLAGS))
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(None, "not a regular file")
        time.sleep(min(_SETTLED_S, max(0.0, _SETTLED_S - (time.time() - status.st_mtime))))
        self._identity = _identity(os.fstat(self._fd))

    @property
    def num_bytes(self) -> int:
        return self._identity[2]

    @property
    def is_intact(self) -> bool:
        return _identity(os.fstat(self._fd)) == self._identity

    @property
    def signature(self) -> Signature:
        return self._identity[2:]

    def is_at(self, path: Path) -> bool:
        """Whether a path still leads to this file, which has not been written to."""
        try:
            return self.is_intact and _identity(path.stat()) == self._identity
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


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """Device, inode, size, modification time."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
