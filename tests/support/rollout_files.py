"""Files of the rollout log, and a disk that fails."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from shopr1_service.monitoring import rotating_jsonl


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("rollouts-*.jsonl"))


def lines(directory: Path) -> list[Any]:
    """Every line of every file; each must be whole."""
    content = [path.read_bytes() for path in files(directory)]
    assert all(part.endswith(b"\n") for part in content if part)
    return [json.loads(line) for part in content for line in part.splitlines()]


def contents(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in files(directory)]


class FullDisk:
    """`os.write` on a disk that takes so many bytes and no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_free: int, code: int = errno.ENOSPC) -> None:
        self.num_free = num_free
        self._code = code
        self._write = os.write
        monkeypatch.setattr(rotating_jsonl, "write", self.write)

    def write(self, descriptor: int, content: memoryview) -> int:
        if self.num_free == 0:
            raise OSError(self._code, os.strerror(self._code))
        part = content[: self.num_free]
        self.num_free -= len(part)  # before the bytes can be seen: then a test may set it again
        return self._write(descriptor, part)
