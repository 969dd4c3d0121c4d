"""Checkpoint directories on the service's disk: the files that an update refers to, each opened once.

A client that may update the policy names a directory. Only files below one of the `policy_roots` are read,
wherever links lead. Weights are safetensors: reading pickled ones can run code.

A trainer may replace files at any time. So that two checkpoints are never mixed, every file is read through
one descriptor, and a set is refused if one of its files was replaced since the directory was listed
(`CheckpointDirectory.check_unchanged`). If some files were replaced before that, only the temporary
file of a copy under way shows it.
"""

import errno
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from shopr1_client.errors import StorageError
from shopr1_service.weights.files import CheckpointFile, ListedDirectory
from shopr1_service.weights.paths import real_path
from shopr1_service.weights.safetensors_header import (
    LENGTH_BYTES,
    MAX_NAME_CHARACTERS,
    Header,
    HeaderError,
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
_UNSUPPORTED = {
    **dict.fromkeys(("pytorch_model*.bin", "adapter_model*.bin", "*.pt", "*.pth"), _PICKLED),
    "*.gguf": "GGUF files are not read for updates: save safetensors",
}
_SHARD_NAME = re.compile(r"[^/\0]{1,240}\.safetensors")
_UNFINISHED = re.compile(
    r"\.(.+)\.[A-Za-z0-9]{6}"  # rsync
    r"|\.?(.+)\.(?:tmp|part|partial|incomplete|filepart)"
)
"""Temporary files of programs that copy; each is renamed when it is complete."""

_FAULTS = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EREMOTEIO}
)
"""Errors of the disk and the system; any other is the client's, such as a file that may not be read."""

_Result = TypeVar("_Result")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read.

    Attributes:
        location: `path`, or the name of the wrong file or tensor.
    """

    def __init__(self, message: str, location: str = "path") -> None:
        super().__init__(message)
        self.location = location


@dataclass(frozen=True)
class Shard:
    """A safetensors file whose data begin at byte `data_start`."""

    file: CheckpointFile
    header: Header
    data_start: int


class CheckpointDirectory:
    """A directory and those of its files that have been opened.

    Args:
        path: absolute, or relative to one of the roots: the first that has it.

    Raises (every method):
        CheckpointError: a file is not there, not below a root, not regular, or malformed.
        StorageError: a disk fails.
    """

    def __init__(self, path: str, roots: Sequence[Path]) -> None:
        self.path = resolve_below(path, roots)
        self._roots = roots
        self._files: dict[str, CheckpointFile] = {}
        self._absent: set[str] = set()
        self._listed = _reading("path", lambda: ListedDirectory(self.path, roots))

    def has(self, name: str) -> bool:
        """Whether the directory had a file of this name when it was listed."""
        if name in self._listed.files:
            return True
        self._absent.add(name)
        return False

    def read(self, name: str, max_bytes: int) -> bytes:
        """All of a file."""
        file = self._open(name)
        if file.num_bytes > max_bytes:
            raise CheckpointError(f"{name} is larger than {max_bytes:,} bytes", name)
        return _reading(name, lambda: file.read(0, file.num_bytes))

    def shard(self, name: str) -> Shard:
        """A safetensors file; its length is checked, its data are not read."""
        file = self._open(name)
        length = _reading(name, lambda: header_length(file.read(0, min(LENGTH_BYTES, file.num_bytes))))
        data_start = LENGTH_BYTES + length
        if file.num_bytes < data_start:  # before memory is allocated for it
            raise CheckpointError(f"{name} is cut off in its header, at {file.num_bytes:,} bytes", name)
        header = _reading(name, lambda: parse_header(file.read(LENGTH_BYTES, length)))
        needed_bytes = data_start + header.num_bytes
        if file.num_bytes != needed_bytes:
            message = "is cut off" if file.num_bytes < needed_bytes else "has more bytes after its tensors"
            raise CheckpointError(f"{name} {message}: {file.num_bytes:,} bytes, not {needed_bytes:,}", name)
        return Shard(file, header, data_start)

    def weights(self) -> tuple[Shard, ...]:
        """`model.safetensors`, or the shards of `model.safetensors.index.json`; each tensor is in one."""
        if self.has(INDEX_FILE):
            return self._indexed_shards()
        if self.has(SINGLE_FILE):
            return (self.shard(SINGLE_FILE),)
        raise self._nothing_found([SINGLE_FILE, INDEX_FILE], "or")

    def adapter(self) -> tuple[bytes, Shard]:
        """Config and safetensors file of an adapter, as PEFT saves it."""
        if not (self.has(ADAPTER_CONFIG_FILE) and self.has(ADAPTER_FILE)):
            raise self._nothing_found([ADAPTER_CONFIG_FILE, ADAPTER_FILE], "and")
        return self.read(ADAPTER_CONFIG_FILE, MAX_ADAPTER_CONFIG_BYTES), self.shard(ADAPTER_FILE)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """At the end, `check_unchanged`. If it fails, this may also be why anything else failed before."""
        try:
            yield
        except Exception:
            self.check_unchanged()
            raise
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Refuse all files opened so far if one was deleted, replaced, written to, or is about to be."""
        for name, file in self._files.items():
            path = real_path(self.path / name, self._roots)
            if path is None or not file.is_at(path):
                raise _changed(name)
        if not self._listed.is_at(self.path):
            raise CheckpointError("the directory was replaced while it was read")
        for name in sorted(_reading("path", self._listed.names_now)):
            if name in self._absent:
                raise CheckpointError(f"{name} appeared while the directory was read", name)
            if (unfinished := _UNFINISHED.fullmatch(name)) and self._files.keys() & set(unfinished.groups()):
                message = f"{name}: a copy is under way, or was broken off: the checkpoint may be a mixture"
                raise CheckpointError(message, name)

    def _open(self, name: str) -> CheckpointFile:
        if name not in self._files:
            path = real_path(self.path / name, self._roots)
            if path is None:
                message = f"{name} is not there, or a link that leads out of the `policy_roots`"
                raise CheckpointError(message, name)
            file = _reading(name, lambda: CheckpointFile(path, self._roots))
            if file.identity != self._listed.files.get(name):
                raise _changed(name)
            self._files[name] = file
        return self._files[name]

    def _indexed_shards(self) -> tuple[Shard, ...]:
        weight_map = self._weight_map()
        names = sorted(set(weight_map.values()))
        if SINGLE_FILE not in names and self.has(SINGLE_FILE):  # of an earlier or a later save
            raise CheckpointError(f"{INDEX_FILE} is of other files than {SINGLE_FILE}: which is meant?")
        shards = {}
        for name in names:
            shards[name] = self.shard(name)
            _check_indexed(shards[name], name, weight_map)
        found = {entry.name for shard in shards.values() for entry in shard.header.entries}
        for name in sorted(weight_map.keys() - found):
            raise CheckpointError(f"tensor {name!r} is not in {weight_map[name]}, but indexed there", name)
        return tuple(shards.values())

    def _weight_map(self) -> Mapping[str, str]:
        content = self.read(INDEX_FILE, MAX_INDEX_BYTES)
        weight_map = _reading(INDEX_FILE, lambda: read_object(content)).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{INDEX_FILE}: weight_map must be an object with tensors", INDEX_FILE)
        for name, shard in weight_map.items():
            if len(name) > MAX_NAME_CHARACTERS:
                raise CheckpointError(f"{INDEX_FILE}: a tensor's name is too long", INDEX_FILE)
            if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
                message = f"{INDEX_FILE}: tensor {name!r} must be in a safetensors file of the directory"
                raise CheckpointError(message, name)
        return weight_map

    def _nothing_found(self, wanted: Sequence[str], conjunction: str) -> CheckpointError:
        found = (
            message
            for pattern, message in _UNSUPPORTED.items()
            if any(fnmatchcase(name, pattern) for name in self._listed.files)
        )
        return CheckpointError(
            f"{next(found, 'no weights there')}; looked for {f' {conjunction} '.join(wanted)}"
        )


def resolve_below(path: str, roots: Sequence[Path]) -> Path:
    """The directory with this path, links resolved.

    Raises:
        CheckpointError: there is none below a root. The message does not tell what there is elsewhere.
    """
    if not roots:
        raise CheckpointError("reading from directories is off: set `policy_roots`")
    if ".." in Path(path).parts:
        raise CheckpointError(f"must not contain '..': {path!r}")
    # With an absolute path on its right, / gives that path.
    found = [real for root in roots if (real := real_path(root / path, roots))]
    for real in found:
        if real.is_dir():
            return real
    message = "not a directory" if found else "no directory of this name below the `policy_roots`"
    raise CheckpointError(f"{message}: {path!r}")


def _changed(name: str) -> CheckpointError:
    return CheckpointError(f"{name} was replaced or written to while it was read", name)


def _reading(name: str, read: Callable[[], _Result]) -> _Result:
    """The result of `read`; its errors name the file.

    Raises:
        CheckpointError: it is not as it must be.
        StorageError: its disk, or the system, fails.
    """
    try:
        return read()
    except HeaderError as error:
        raise CheckpointError(f"{name}: {error}", error.tensor or name) from error
    except OSError as error:
        if error.errno in _FAULTS:
            raise StorageError(f"{name} cannot be read: {error.strerror}") from error
        raise CheckpointError(f"{name}: {error.strerror}", name) from error


def _check_indexed(shard: Shard, file: str, weight_map: Mapping[str, str]) -> None:
    """Each tensor is where the index has it, so none is in two shards."""
    for entry in shard.header.entries:
        if (indexed := weight_map.get(entry.name)) != file:
            message = f"indexed in {indexed}" if indexed else "not indexed"
            raise CheckpointError(f"tensor {entry.name!r} is in {file}, but {message}", entry.name)
