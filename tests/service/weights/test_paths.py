"""Paths whose parts are replaced between the check and the opening."""

import os
from pathlib import Path

import pytest

from shopr1_service.weights.paths import open_below, real_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "a" / "b").mkdir(parents=True)
    (tmp_path / "root" / "a" / "b" / "file").write_text("inside")
    (tmp_path / "outside" / "b").mkdir(parents=True)
    (tmp_path / "outside" / "b" / "file").write_text("outside")
    return tmp_path / "root"


def content(path: Path, *roots: Path) -> str:
    fd = open_below(path, roots, os.O_RDONLY)
    try:
        return os.read(fd, 100).decode()
    finally:
        os.close(fd)


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # not every one is a path


def test_files_and_directories_below_a_root(root: Path, tmp_path: Path) -> None:
    before = num_open()
    path = root / "a" / "b" / "file"
    assert real_path(path, [tmp_path / "none", root]) == path
    assert content(path, tmp_path / "none", root) == "inside"
    fd = open_below(root, [root], os.O_RDONLY | os.O_DIRECTORY)
    assert os.listdir(fd) == ["a"]  # noqa: PTH208  # by its descriptor
    os.close(fd)
    assert num_open() == before


def test_roots_that_are_links(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("root")
    real = real_path(tmp_path / "link" / "a" / "b" / "file", [tmp_path / "link"])
    assert real == root / "a" / "b" / "file"
    assert content(real, tmp_path / "link") == "inside"


@pytest.mark.parametrize("part", ["a", "a/b", "a/b/file"])
@pytest.mark.parametrize("is_inside", [False, True])
def test_part_that_became_a_link_is_not_followed(
    root: Path, tmp_path: Path, part: str, is_inside: bool
) -> None:
    """Not even one that stays below the root: what it leads to has not been checked."""
    path = real_path(root / "a" / "b" / "file", [root])
    assert path is not None
    before = num_open()
    kept = (root if is_inside else tmp_path) / "kept"
    (root / part).rename(kept)
    target = kept if is_inside else tmp_path / "outside" / Path(part).relative_to("a")
    (root / part).symlink_to(target)
    assert (root / "a" / "b" / "file").read_text() == ("inside" if is_inside else "outside")
    with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
        content(path, root)
    assert num_open() == before


def test_paths_out_of_the_roots(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside" / "b" / "file"
    assert real_path(outside, [root]) is None
    with pytest.raises(FileNotFoundError):
        open_below(outside, [root], os.O_RDONLY)
    with pytest.raises(FileNotFoundError):
        open_below(root / "a" / "none", [root], os.O_RDONLY)


def test_strings_that_are_no_paths(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    assert real_path(root / "loop", [root]) is None
    assert real_path(root / "a\0b", [root]) is None
