"""Checkpoints on the service's disk: which files an update means, and what is in them.

Whoever may update the policy names a directory, and gets nothing read that does not lie below one of the
`policy_roots`, wherever links lead. Weights are safetensors: pickled ones run code when they are read.
Nothing but headers is read here.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BufferedReader
from pathlib import Path

from shopr1_service.weights.safetensors_header import (
    LENGTH_BYTES,
    MAX_NAME_CHARACTERS,
    Header,
    HeaderError,
    TensorEntry,
    header_length,
    parse_header,
    read_object,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
MAX_INDEX_BYTES = 32 * 2**20
MAX_ADAPTER_CONFIG_BYTES = 2**20

_PICKLED = "pickled weights are not read, they can run code: save safetensors"
_NOT_READ = {
    **dict.fromkeys(("pytorch_model*.bin", "adapter_model*.bin", "*.pt", "*.pth"), _PICKLED),
    "*.gguf": "GGUF files are not read for updates: save safetensors",
}
_SHARD_NAME = re.compile(r"[^/\0]{1,240}\.safetensors")
# A pipe is not waited for, a terminal not taken, and a link that comes after the check not followed.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is none.

    Attributes:
        location: `path`, or the name of the file or tensor that is wrong.
    """

    def __init__(self, message: str, location: str = "path") -> None:
        super().__init__(message)
        self.location = location


@dataclass(frozen=True)
class Shard:
    """A safetensors file. Its data are `num_bytes` from byte `data_start` on."""

    path: Path
    header: Header
    data_start: int

    @property
    def num_bytes(self) -> int:
        return self.header.num_bytes


@dataclass(frozen=True)
class Checkpoint:
    """A directory of weights; every tensor stands in one shard."""

    directory: Path
    shards: tuple[Shard, ...]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def entries(self) -> Iterator[TensorEntry]:
        return (entry for shard in self.shards for entry in shard.header.entries)


def resolve_below(path: str, roots: Sequence[Path]) -> Path:
    """The directory that `path` means, links resolved.

    Args:
        path: absolute, or relative to one of the roots: the first that has it.

    Raises:
        CheckpointError: there is none below a root. Nobody learns from it what there is elsewhere.
    """
    if not roots:
        raise CheckpointError("reading from directories is off: set `policy_roots`")
    if ".." in Path(path).parts:
        raise CheckpointError(f"must not contain '..': {path!r}")
    # With an absolute path on its right, / gives that path.
    found = [real for root in roots if (real := _real_path(root / path, roots))]
    for real in found:
        if real.is_dir():
            return real
    flaw = "not a directory" if found else "nothing of this name below the `policy_roots`"
    raise CheckpointError(f"{flaw}: {path!r}")


def open_checkpoint(path: str, roots: Sequence[Path]) -> Checkpoint:
    """The checkpoint in a directory: `model.safetensors`, or the shards of `model.safetensors.index.json`.

    Raises:
        CheckpointError: neither is there, one lies outside of the roots, is no regular file, is not as long
            as its header says, or index and shards do not fit together.
    """
    directory = resolve_below(path, roots)
    names = _names(directory)
    if INDEX_FILE in names:
        shards = _indexed_shards(directory, names, roots)
    elif SINGLE_FILE in names:
        shards = [_read_shard(directory, SINGLE_FILE, roots)]
    else:
        raise _nothing_found(names, [SINGLE_FILE, INDEX_FILE], "or")
    return Checkpoint(directory, tuple(shards))


def adapter_files(path: str, roots: Sequence[Path]) -> tuple[Path, Path]:
    """Config and weights of the adapter that PEFT saved in a directory.

    Raises:
        CheckpointError: as of `open_checkpoint`, or the config is too large to be one.
    """
    directory = resolve_below(path, roots)
    names = _names(directory)
    if not {ADAPTER_CONFIG_FILE, ADAPTER_FILE} <= names:
        raise _nothing_found(names, [ADAPTER_CONFIG_FILE, ADAPTER_FILE], "and")
    with _opened(directory, ADAPTER_CONFIG_FILE, roots) as (config, file):
        _read(file, ADAPTER_CONFIG_FILE, MAX_ADAPTER_CONFIG_BYTES)
    return config, _read_shard(directory, ADAPTER_FILE, roots).path


def open_regular(path: Path) -> BufferedReader:
    """A file, opened to be read. Does not wait, and does not follow a link at the path's end.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, _FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "not a regular file")
    return open(descriptor, "rb")  # noqa: PTH123  # it is no path


def _real_path(path: Path, roots: Sequence[Path]) -> Path | None:
    """Where a path leads; None if nowhere, or out of the roots."""
    try:
        real = path.resolve(strict=True)
        allowed = [root.resolve() for root in roots]
    except (OSError, RuntimeError, ValueError):  # links in a circle; what can be no path
        return None
    return real if any(real.is_relative_to(root) for root in allowed) else None


def _names(directory: Path) -> set[str]:
    try:
        return {path.name for path in directory.iterdir()}
    except OSError as error:
        raise CheckpointError(f"cannot be listed: {error.strerror}") from error


def _nothing_found(names: set[str], wanted: Sequence[str], conjunction: str) -> CheckpointError:
    flaws = [flaw for pattern, flaw in _NOT_READ.items() if any(fnmatchcase(name, pattern) for name in names)]
    looked_for = f" {conjunction} ".join(wanted)
    return CheckpointError(f"{flaws[0] if flaws else 'no weights there'}; looked for {looked_for}")


@contextmanager
def _opened(directory: Path, name: str, roots: Sequence[Path]) -> Iterator[tuple[Path, BufferedReader]]:
    """A file of a directory and its real path; what is wrong with it is a `CheckpointError`."""
    path = _real_path(directory / name, roots)
    if path is None:
        raise CheckpointError(f"{name} is not there, or a link that leads out of the `policy_roots`", name)
    try:
        with open_regular(path) as file:
            yield path, file
    except HeaderError as error:
        raise CheckpointError(f"{name}: {error}", error.tensor or name) from error
    except OSError as error:
        raise CheckpointError(f"{name}: {error.strerror}", name) from error


def _read_shard(directory: Path, name: str, roots: Sequence[Path]) -> Shard:
    with _opened(directory, name, roots) as (path, file):
        size_bytes = os.fstat(file.fileno()).st_size
        length = header_length(file.read(LENGTH_BYTES))
        data_start = LENGTH_BYTES + length
        if size_bytes < data_start:  # before so much memory is taken for it
            raise CheckpointError(f"{name} is cut off in its header, at {size_bytes:,} bytes", name)
        header = parse_header(file.read(length))
    wanted_bytes = data_start + header.num_bytes
    if size_bytes != wanted_bytes:
        flaw = "is cut off" if size_bytes < wanted_bytes else "goes on behind its tensors"
        raise CheckpointError(f"{name} {flaw}: {size_bytes:,} bytes, not {wanted_bytes:,}", name)
    return Shard(path, header, data_start)


def _indexed_shards(directory: Path, names: set[str], roots: Sequence[Path]) -> list[Shard]:
    weight_map = _read_index(directory, roots)
    files = sorted(set(weight_map.values()))
    if SINGLE_FILE in names and SINGLE_FILE not in files:  # of an earlier or a later save: nobody knows
        raise CheckpointError(f"{INDEX_FILE} is of other files than {SINGLE_FILE}: which is meant?")
    shards = []
    for file in files:
        shards.append(_read_shard(directory, file, roots))
        _check_indexed(shards[-1], file, weight_map)
    missing = weight_map.keys() - {entry.name for shard in shards for entry in shard.header.entries}
    if missing:
        name = min(missing)
        raise CheckpointError(f"tensor {name!r} is not in {weight_map[name]}, but indexed there", name)
    return shards


def _read(file: BufferedReader, name: str, max_bytes: int) -> bytes:
    if len(content := file.read(max_bytes + 1)) > max_bytes:
        raise CheckpointError(f"{name} is larger than {max_bytes:,} bytes", name)
    return content


def _read_index(directory: Path, roots: Sequence[Path]) -> Mapping[str, str]:
    with _opened(directory, INDEX_FILE, roots) as (_, file):
        weight_map = read_object(_read(file, INDEX_FILE, MAX_INDEX_BYTES)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE}: weight_map must be an object with tensors", INDEX_FILE)
    for name, shard in weight_map.items():
        if len(name) > MAX_NAME_CHARACTERS:
            raise CheckpointError(f"{INDEX_FILE}: a tensor's name is too long", INDEX_FILE)
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(f"{INDEX_FILE}: tensor {name!r} must be in a safetensors file there", name)
    return weight_map


def _check_indexed(shard: Shard, file: str, weight_map: Mapping[str, str]) -> None:
    """Each tensor stands where the index has it: so none stands in two shards."""
    for entry in shard.header.entries:
        if (indexed := weight_map.get(entry.name)) != file:
            flaw = f"indexed in {indexed}" if indexed else "not indexed"
            raise CheckpointError(f"tensor {entry.name!r} is in {file}, but {flaw}", entry.name)
