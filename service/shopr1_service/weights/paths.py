"""Paths below the `policy_roots`: resolved once, then opened part by part, without following links.

Between the two steps another process may put a link in the place of any directory on the way. Each part is
therefore opened relative to the descriptor of the one before it, and a link there is an error.
"""

import os
from collections.abc import Sequence
from pathlib import Path

_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def real_path(path: Path, roots: Sequence[Path]) -> Path | None:
    """Where a path leads; None if nowhere, or out of the roots."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # circular links; strings that can be no path
        return None
    return real if _root_of(real, roots) else None


def open_below(path: Path, roots: Sequence[Path], flags: int) -> int:
    """Descriptor of a file or directory.

    Args:
        path: as `real_path` gives it.
        flags: of `os.open`.

    Raises:
        OSError: it cannot be opened, a part of the path is a link now, or it is in none of the roots.
    """
    root = _root_of(path, roots)
    if root is None:
        raise FileNotFoundError(path)
    *parents, name = (str(root), *path.relative_to(root).parts)
    at: int | None = None
    try:
        for parent in parents:
            inner = os.open(parent, _WALK, dir_fd=at)
            _close(at)
            at = inner
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    finally:
        _close(at)


def _root_of(path: Path, roots: Sequence[Path]) -> Path | None:
    try:
        return next((real for root in roots if path.is_relative_to(real := root.resolve())), None)
    except (OSError, RuntimeError):
        return None


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
