"""Bytes that wait for the engines: of uploads, each in a private file."""

import asyncio
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from shopr1_client.errors import NotFoundError, StorageError
from shopr1_service.weights.files import AnonymousTempFile

_IDLE_S = 600.0
"""Whoever sends nothing for so long is gone."""


@dataclass
class _Kept:
    file: AnonymousTempFile
    is_coming: bool = True
    touched_s: float = field(default_factory=time.monotonic)

    @property
    def is_given_up(self) -> bool:
        return self.is_coming and time.monotonic() - self.touched_s > _IDLE_S


class Uploads:
    """See the module. Used from one event loop.

    Raises (every method):
        NotFoundError: there is no such upload any more.
        StorageError: there is no room.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._kept: dict[str, _Kept] = {}

    def begin(self) -> str:
        """The id of a new one."""
        file = AnonymousTempFile(self._directory)
        upload = uuid.uuid4().hex
        self._kept[upload] = _Kept(file)
        return upload

    async def append(self, upload: str, piece: bytes) -> None:
        """One piece after another."""
        kept = self._find(upload)
        await asyncio.to_thread(kept.file.append, memoryview(piece))
        kept.touched_s = time.monotonic()

    async def read(self, upload: str, start: int, max_bytes: int) -> bytes:
        """What stands there; nothing behind its end."""
        file = self._find(upload).file
        piece = bytearray(max(0, min(max_bytes, file.num_bytes - start)))
        try:
            await asyncio.to_thread(file.read_into, memoryview(piece), start)
        except OSError as error:
            raise StorageError(f"an upload cannot be read again: {error.strerror or error}") from error
        return bytes(piece)

    def end(self, upload: str) -> None:
        """Nothing more comes of it."""
        self._find(upload).is_coming = False

    def discard(self, upload: str) -> None:
        self._kept.pop(upload, None)

    def keep_only(self, uploads: Collection[str]) -> None:
        """The others are not needed, unless they are still coming."""
        self._kept = {
            upload: kept
            for upload, kept in self._kept.items()
            if upload in uploads or (kept.is_coming and not kept.is_given_up)
        }

    def _find(self, upload: str) -> _Kept:
        kept = self._kept.get(upload)
        if kept is None:
            raise NotFoundError("the upload is not kept any more")
        return kept
