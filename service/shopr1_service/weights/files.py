"""Files that weights stand in, held open."""

import errno
import os
import tempfile
import threading
import time
import weakref
from io import BufferedReader
from pathlib import Path

_SETTLED_S = 0.05
"""Longer than the steps of any file system's clock: whatever is written later has another time."""
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""What file systems say that know of no room beforehand."""
Signature = tuple[int, int]
"""A file's size, and when it was written, in ns."""
CLOSE_THREAD = "close"
"""Name of the threads that close private files."""


class OpenFile:
    """Bytes on disk, read anywhere, by several threads at once.

    Raises (every method):
        OSError: the disk fails.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # Not a file object: those complain when they are not closed by hand.
        self._end = weakref.finalize(self, self._close, fd)
        self._end.atexit = False  # the system closes it then, too

    @property
    def is_intact(self) -> bool:
        """Whether nobody has written to it."""
        return True

    @property
    def signature(self) -> Signature | None:
        """The same for the same content; None: nobody else has it."""
        return None

    @staticmethod
    def _close(fd: int) -> None:
        os.close(fd)

    def read_into(self, block: memoryview, start: int) -> None:
        """Fill a block with what stands from `start` on."""
        while block:
            num_read = os.preadv(self._fd, [block], start)
            if not num_read:
                raise OSError(None, f"the file ends at byte {start}")
            start += num_read
            block = block[num_read:]


class AnonymousTempFile(OpenFile):
    """A file that nobody else can see or leave behind: it has no name, and ends with its last holder.

    Args:
        directory: on which file system; default: the system's for temporary files.

    Raises (every method):
        OSError: the disk is full or fails.
    """

    def __init__(self, directory: Path | None = None) -> None:
        fd, path = tempfile.mkstemp(prefix="shopr1-", dir=directory)
        Path(path).unlink()
        super().__init__(fd)
        self.num_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Make sure that there is room for so many. It makes writing them faster, too."""
        try:
            os.posix_fallocate(self._fd, 0, max(1, num_bytes))
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise

    def append(self, block: memoryview) -> int:
        """Write all of a block at the end; returns where it begins. From one thread at a time."""
        start = self.num_bytes
        while block:
            num_written = os.pwrite(self._fd, block, self.num_bytes)
            self.num_bytes += num_written
            block = block[num_written:]
        return start

    def discard(self) -> None:
        """Give its room back now, and not when its last holder has gone. It is of no use from then on."""
        if self._end.detach():
            os.close(self._fd)

    @staticmethod
    def _close(fd: int) -> None:
        # Its last holder may be the engine, and to give its room back takes as long as to write some of it.
        try:
            threading.Thread(target=os.close, args=(fd,), name=CLOSE_THREAD).start()
        except RuntimeError:  # the interpreter ends, or there are too many
            os.close(fd)


class CheckpointFile(OpenFile):
    """A file that somebody else may change. To delete or to rename it does no harm: it is held open."""

    def __init__(self, file: BufferedReader) -> None:
        super().__init__(os.dup(file.fileno()))
        age_s = time.time() - os.fstat(self._fd).st_mtime
        time.sleep(min(_SETTLED_S, max(0.0, _SETTLED_S - age_s)))
        self._signature = self._sign()

    @property
    def is_intact(self) -> bool:
        return self._sign() == self._signature

    @property
    def signature(self) -> Signature:
        return self._signature

    def _sign(self) -> Signature:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns
