"""Uploaded files that engines read from the coordinator, each in an anonymous file in `staging_dir`."""

import asyncio
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from shopr1_client.errors import NotFoundError, StorageError
from shopr1_service.weights.files import AnonymousTempFile

_IDLE_S = 600.0
"""An incomplete upload that has grown by nothing for this long is abandoned."""


@dataclass
class _Upload:
    file: AnonymousTempFile
    last_append_s: float = field(default_factory=time.monotonic)
    is_complete: bool = False


class UploadStore:
    """Uploads by their ids. Used from one event loop.

    Raises (every method):
        NotFoundError: the upload does not exist any more.
        StorageError: the disk is full, or fails.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._uploads: dict[str, _Upload] = {}

    def __len__(self) -> int:
        return len(self._uploads)

    def create(self) -> str:
        """Create an empty upload, and return its id."""
        file = AnonymousTempFile(self._directory)
        upload = uuid.uuid4().hex
        self._uploads[upload] = _Upload(file)
        return upload

    async def append(self, upload: str, chunk: bytes) -> None:
        """Append a chunk. Not to be called again before it has returned."""
        found = self._find(upload)
        await asyncio.to_thread(found.file.append, memoryview(chunk))
        found.last_append_s = time.monotonic()

    async def read(self, upload: str, start: int, max_bytes: int) -> bytes:
        """Read a chunk; an empty one is the end."""
        file = self._find(upload).file
        chunk = bytearray(max(0, min(max_bytes, file.num_bytes - start)))
        try:
            await asyncio.to_thread(file.read_into, memoryview(chunk), start)
        except OSError as error:
            raise StorageError(f"an upload cannot be read again: {error.strerror or error}") from error
        return bytes(chunk)

    def complete(self, upload: str) -> None:
        """Mark an upload as complete: it is deleted once no log needs it."""
        self._find(upload).is_complete = True

    def delete(self, upload: str) -> None:
        """Delete an upload, if it exists."""
        self._uploads.pop(upload, None)

    def prune(self, needed: Collection[str]) -> None:
        """Delete complete uploads that are not needed, and abandoned ones."""
        abandoned_s = time.monotonic() - _IDLE_S
        for upload, found in list(self._uploads.items()):
            if upload not in needed and (found.is_complete or found.last_append_s < abandoned_s):
                del self._uploads[upload]

    def _find(self, upload: str) -> _Upload:
        if upload not in self._uploads:
            raise NotFoundError("the upload is not stored any more")
        return self._uploads[upload]
