"""New weights before they are loaded: their files, and every check that needs only the model's tensors.

Names, shapes and dtypes are checked before data arrive, all numbers once they are in files. Streams are
written to an anonymous file; checkpoint files are not copied. Both are read again when they are loaded.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from shopr1_client.errors import FieldError, InvalidWeightsError
from shopr1_service.field_errors import raise_if_any
from shopr1_service.weights.checkpoint import Shard
from shopr1_service.weights.files import AnonymousTempFile
from shopr1_service.weights.safetensors_header import TensorEntry
from shopr1_service.weights.tensors import PIECE_BYTES, Buffers, TensorLocation, Weights, run_in_threads

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size, bytes."""
_CHECKED_BYTES = 2**20
"""Bytes checked at a time. They are read twice, the second time from the core's cache."""


class StagedWeights:
    """Tensors of one update. Call `expect` or `refer`, `append` each block of a stream, then `check`.

    Args:
        directory: of the anonymous file.
        is_partial: the model's other tensors stay as they are.

    Attributes:
        num_bytes: received, or checked if they were in files already.
        num_expected_bytes: 0 until it is known.
        locations: by name.

    Raises (every method):
        InvalidWeightsError: not weights of this policy.
        StorageError: there is no room.
    """

    def __init__(self, weights: Weights, directory: Path | None, *, is_partial: bool) -> None:
        self.num_bytes = 0
        self.num_expected_bytes = 0
        self.locations: dict[str, TensorLocation] = {}
        self._weights = weights
        self._is_partial = is_partial
        self._file = AnonymousTempFile(directory)
        self._is_discarded = False
        self._counting = threading.Lock()

    def expect(self, entries: Sequence[TensorEntry]) -> None:
        """Tensors whose bytes will be appended in this order."""
        self._check_names(entries)
        self.locations = {
            each.name: TensorLocation(self._file, each.start, each.dtype)
            for each in entries
            if not self._weights.is_ignored(each.name)
        }

    def append(self, block: memoryview) -> None:
        """Bytes of a stream, cut anywhere; their number is checked by its reader."""
        if not self.num_bytes:
            self._file.reserve(self.num_expected_bytes)
        self._file.append(block)
        self.num_bytes += len(block)

    def refer(self, shards: Sequence[Shard]) -> None:
        """Tensors in checkpoint files."""
        self._check_names([entry for shard in shards for entry in shard.header.entries])
        self.locations = {
            entry.name: TensorLocation(shard.file, shard.data_start + entry.start, entry.dtype)
            for shard in shards
            for entry in shard.header.entries
            if not self._weights.is_ignored(entry.name)
        }

    def check(self) -> None:
        """Check all numbers and ties; afterwards `locations` has the names of the model.

        Raises:
            OSError: a file cannot be read.
        """
        buffers = Buffers()
        run_in_threads(lambda piece: self._check_piece(*piece, buffers), list(self._pieces()))
        self._check_ties()

    def discard(self) -> None:
        """Free the space, and end a check that still runs."""
        self._is_discarded = True
        self._file.discard()

    def _check_names(self, entries: Sequence[TensorEntry]) -> None:
        names: set[str] = set()
        errors: list[FieldError] = []
        for entry in entries:
            if self._weights.is_ignored(entry.name):
                continue
            if message := self._name_flaw(entry, names):
                errors.append({"location": entry.name, "message": message})
            names.add(entry.name)
        if not self._is_partial:
            owners = {self._weights.aliases.get(name, name) for name in names}
            missing = [name for name in self._weights.tensors if name not in owners]
            errors += [{"location": name, "message": "it is missing"} for name in missing]
        raise_if_any(errors, InvalidWeightsError)
        if not names:
            raise InvalidWeightsError("there are no tensors")
        self.num_expected_bytes = sum(entry.num_bytes for entry in entries)

    def _name_flaw(self, entry: TensorEntry, names: set[str]) -> str | None:
        tensor = self._weights.find(entry.name)
        if tensor is None:
            return "the policy has no such tensor"
        if entry.name in names:
            return "duplicate tensor"
        if entry.shape != tuple(tensor.shape):
            return f"its shape is {list(entry.shape)}, the policy's {list(tensor.shape)}"
        return None

    def _pieces(self) -> Iterator[tuple[str, TensorLocation, int, int]]:
        """Name, location, first element and number of elements of each piece."""
        for name, location in self.locations.items():
            tensor = self._weights.find(name)
            assert tensor is not None
            step = PIECE_BYTES // location.dtype.itemsize
            for first in range(0, tensor.numel(), step):
                yield name, location, first, min(step, tensor.numel() - first)

    def _check_piece(
        self, name: str, location: TensorLocation, first: int, num_elements: int, buffers: Buffers
    ) -> None:
        if self._is_discarded:
            raise InvalidWeightsError("the update was given up")
        tensor = self._weights.find(name)
        assert tensor is not None
        given = buffers.read(location, first, num_elements)
        own = given.to(tensor.dtype)
        if not _is_finite(own):
            message = f"values too large for {own.dtype}" if _is_finite(given) else "NaN or infinite values"
            raise_if_any([{"location": name, "message": message}], InvalidWeightsError)
        if location.file is not self._file:
            with self._counting:
                self.num_bytes += given.nbytes

    def _check_ties(self) -> None:
        """Keep one of the tensors that share memory in the model; they must be equal."""
        for alias, owner in self._weights.aliases.items():
            if (given := self.locations.pop(alias, None)) is None:
                continue
            kept = self.locations.setdefault(owner, given)
            if kept is not given and not self._is_equal(kept, given, owner):
                message = f"it differs from {owner}, and the policy has one tensor for both"
                raise_if_any([{"location": alias, "message": message}], InvalidWeightsError)

    def _is_equal(self, one: TensorLocation, other: TensorLocation, name: str) -> bool:
        tensor, buffers = self._weights.tensors[name], (Buffers(), Buffers())
        step = PIECE_BYTES // max(one.dtype.itemsize, other.dtype.itemsize)
        for first in range(0, tensor.numel(), step):
            span = first, min(step, tensor.numel() - first)
            own = buffers[0].read(one, *span).to(tensor.dtype)
            if not torch.equal(own, buffers[1].read(other, *span).to(tensor.dtype)):
                return False
        return True


def _is_finite(values: torch.Tensor) -> bool:
    # As integers, infinity and NaN are the largest numbers of each sign. NumPy finds those at memory speed
    # and on one thread; torch's threads would compete with the engine.
    integer = _INTEGERS[values.itemsize]
    infinity = int(torch.tensor(math.inf, dtype=values.dtype).view(integer))
    negative_infinity = infinity + (1 << (8 * values.itemsize - 1))
    parts = (part.numpy() for part in torch.split(values.view(integer), _CHECKED_BYTES // values.itemsize))
    pairs = ((part, part.view(f"u{values.itemsize}")) for part in parts)
    return all(a.max(initial=0) < infinity and int(b.max(initial=0)) < negative_infinity for a, b in pairs)
