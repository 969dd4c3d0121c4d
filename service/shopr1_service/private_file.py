"""A file that nobody else can see, change or leave behind: it has no name, and ends with its last holder."""

import os
import tempfile
import weakref
from pathlib import Path


class PrivateFile:
    """Bytes on disk, written at the end and read anywhere. Not for use by several threads at once.

    Args:
        directory: on which file system; default: the system's for temporary files.

    Raises (every method):
        OSError: the disk is full or fails.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._fd, path = tempfile.mkstemp(prefix="shopr1-", dir=directory)
        Path(path).unlink()
        self.num_bytes = 0
        # Not a file object: those complain when they are not closed by hand.
        self._end = weakref.finalize(self, os.close, self._fd)

    def append(self, block: memoryview) -> int:
        """Write all of a block at the end; returns where it begins."""
        start = self.num_bytes
        while block:
            num_written = os.pwrite(self._fd, block, self.num_bytes)
            self.num_bytes += num_written
            block = block[num_written:]
        return start

    def discard(self) -> None:
        """Give its room back now, and not when its last holder has gone. It is of no use from then on."""
        self._end()

    def read_into(self, block: memoryview, start: int) -> None:
        """Fill a block with what stands from `start` on."""
        while block:
            num_read = os.preadv(self._fd, [block], start)
            if not num_read:
                raise OSError(f"the file ends at byte {start}")
            start += num_read
            block = block[num_read:]
