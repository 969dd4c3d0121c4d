"""New weights before they are loaded: their files, and every check that needs only the model's tensors.

Names, shapes and dtypes are checked before data arrive, all numbers once they are in files. Streams are
written to an anonymous file; checkpoint files are not copied. Both are read again when they are loaded. Of
tensors that an operation converts, the results are written to the anonymous file.
"""

import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from shopr1_client.errors import FieldError, InvalidWeightsError
from shopr1_service.field_errors import raise_if_any
from shopr1_service.weights.checkpoint import Shard
from shopr1_service.weights.constants import contradiction
from shopr1_service.weights.conversion import Conversion, plan_conversion
from shopr1_service.weights.files import AnonymousTempFile
from shopr1_service.weights.safetensors_header import TensorEntry
from shopr1_service.weights.samples import Sampler, digest_of, sample_of
from shopr1_service.weights.tensors import (
    PIECE_BYTES,
    Buffers,
    TensorLocation,
    UpdateContents,
    Weights,
    run_in_threads,
    store,
)

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
        locations: by the model's name; set by `check`.

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
        self._conversion = Conversion()
        self._entries: dict[str, TensorEntry] = {}
        self._given: dict[str, TensorLocation] = {}
        self._sampler = Sampler()
        self._is_discarded = False
        self._counting = threading.Lock()

    @property
    def contents(self) -> UpdateContents:
        """Contents of the update, after `check`."""
        signatures = {location.file.signature for location in self._given.values()}
        samples = {name: each.sample for name, each in self.locations.items() if each.sample is not None}
        return UpdateContents(
            frozenset(self.locations), frozenset(each for each in signatures if each), digest_of(samples)
        )

    def expect(self, entries: Sequence[TensorEntry]) -> None:
        """Tensors whose bytes will be appended in this order."""
        self._plan(entries)
        self._given = {each.name: TensorLocation(self._file, each.start, each.dtype) for each in entries}
        self.num_expected_bytes = sum(entry.num_bytes for entry in entries)

    def append(self, block: memoryview) -> None:
        """Bytes of a stream, cut anywhere; their number is checked by its reader."""
        if not self.num_bytes:
            self._file.reserve(self.num_expected_bytes)
        self._file.append(block)
        self.num_bytes += len(block)

    def refer(self, shards: Sequence[Shard]) -> None:
        """Tensors in checkpoint files."""
        self._plan([entry for shard in shards for entry in shard.header.entries])
        self._given = {
            entry.name: TensorLocation(shard.file, shard.data_start + entry.start, entry.dtype)
            for shard in shards
            for entry in shard.header.entries
        }
        self.num_expected_bytes = sum(self._entries[name].num_bytes for name in self._conversion.targets)

    def check(self) -> None:
        """Check all numbers and ties, and convert; afterwards `locations` has the names of the model.

        Raises:
            OSError: a file cannot be read.
        """
        buffers = Buffers()
        run_in_threads(lambda piece: self._check_piece(*piece, buffers), list(self._pieces()))
        self._check_integers()
        self._check_constants()
        self.locations = {
            target: replace(self._given[name], sample=self._sampler.sample(name))
            for name, target in self._conversion.renamed.items()
            if self._weights.find(target) is not None
        } | self._merged()
        self._check_ties()

    def discard(self) -> None:
        """Free the space, and end a check that still runs."""
        self._is_discarded = True
        self._file.discard()

    def _plan(self, entries: Sequence[TensorEntry]) -> None:
        entries = [entry for entry in entries if not self._weights.is_ignored(entry.name)]
        self._entries = {entry.name: entry for entry in entries}
        self._conversion = plan_conversion(
            self._weights.model, {name: entry.shape for name, entry in self._entries.items()}
        )
        errors = [*self._conversion.flaws, *self._dtype_flaws(), *_repeated(entries)]
        if not self._is_partial:
            made = {target for merge in self._conversion.merges for target in merge.targets}
            names = {*self._conversion.renamed.values(), *made}
            owners = {self._weights.aliases.get(name, name) for name in names}
            missing = [name for name in self._weights.tensors if name not in owners]
            errors += [{"location": name, "message": "it is missing"} for name in missing]
        raise_if_any(errors, InvalidWeightsError)
        if not self._conversion.targets:
            raise InvalidWeightsError("there are no tensors")

    def _dtype_flaws(self) -> list[FieldError]:
        return [
            {
                "location": name,
                "message": f"it is {self._entries[name].dtype}, and the policy's has fractions",
            }
            for name, target in self._conversion.targets.items()
            if self._weights.find(target) is not None and not self._entries[name].dtype.is_floating_point
        ]

    def _pieces(self) -> Iterator[tuple[str, torch.dtype, int, int]]:
        """Name, dtype in the model, first element and number of elements of each piece."""
        for name, target in self._conversion.targets.items():
            entry, own = self._entries[name], self._weights.find(target)
            if own is None:  # integers
                continue
            num_elements, step = math.prod(entry.shape), PIECE_BYTES // entry.dtype.itemsize
            for first in range(0, num_elements, step):
                yield name, own.dtype, first, min(step, num_elements - first)

    def _check_piece(
        self, name: str, dtype: torch.dtype, first: int, num_elements: int, buffers: Buffers
    ) -> None:
        if self._is_discarded:
            raise InvalidWeightsError("the update was given up")
        location = self._given[name]
        given = buffers.read(location, first, num_elements)
        if not _is_finite(own := given.to(dtype)):
            message = f"values too large for {own.dtype}" if _is_finite(given) else "NaN or infinite values"
            raise_if_any([{"location": name, "message": message}], InvalidWeightsError)
        self._sampler.add(name, own, first, math.prod(self._entries[name].shape))
        if location.file is not self._file:
            with self._counting:
                self.num_bytes += given.nbytes

    def _check_integers(self) -> None:
        """They are not trained, so they must be the policy's."""
        own, message = self._weights.model.state_dict(), "it differs from the policy's, and is not updated"
        for name, target in self._conversion.renamed.items():
            if self._weights.find(target) is not None:
                continue
            if not torch.equal(self._read(name).double(), own[target].cpu().double()):
                raise_if_any([{"location": name, "message": message}], InvalidWeightsError)

    def _check_constants(self) -> None:
        """The policy computes them from its config, so they must be the same."""
        model = self._weights.model
        for name, target in self._conversion.constants.items():
            if (flaw := contradiction(model, target, self._stored(name))) is not None:
                raise_if_any([{"location": name, "message": flaw}], InvalidWeightsError)

    def _merged(self) -> dict[str, TensorLocation]:
        """Locations of the tensors that operations make, one after the other."""
        locations: dict[str, TensorLocation] = {}
        merges = self._conversion.merges
        if merges:
            made = [self._weights.find(name) for merge in merges for name in merge.targets]
            num_bytes = sum(own.nbytes for own in made if own is not None)
            self._file.reserve(self._file.num_bytes + num_bytes)
        for merge in merges:
            for name, tensor in merge.run(self._weights.model, self._read).items():
                locations[name] = store(tensor.contiguous(), self._file)
        return locations

    def _read(self, name: str) -> torch.Tensor:
        """A whole tensor, in the model's dtype."""
        values, own = self._stored(name), self._weights.find(self._conversion.targets[name])
        values = values if own is None else values.to(own.dtype)
        if (checked := self._sampler.sample(name)) is not None and not torch.equal(
            sample_of(values), checked
        ):
            message = "it was written to after it was checked"
            raise_if_any([{"location": name, "message": message}], InvalidWeightsError)
        return values

    def _stored(self, name: str) -> torch.Tensor:
        """A whole tensor, as it is in its file."""
        entry = self._entries[name]
        return Buffers().read(self._given[name], 0, math.prod(entry.shape)).view(entry.shape)

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


def _repeated(entries: Sequence[TensorEntry]) -> list[FieldError]:
    counts = Counter(entry.name for entry in entries)
    return [{"location": name, "message": "duplicate tensor"} for name, num in counts.items() if num > 1]


def _is_finite(values: torch.Tensor) -> bool:
    # As integers, infinity and NaN are the largest numbers of each sign. NumPy finds those at memory speed
    # and on one thread; torch's threads would compete with the engine.
    integer = _INTEGERS[values.itemsize]
    infinity = int(torch.tensor(math.inf, dtype=values.dtype).view(integer))
    negative_infinity = infinity + (1 << (8 * values.itemsize - 1))
    parts = (part.numpy() for part in torch.split(values.view(integer), _CHECKED_BYTES // values.itemsize))
    pairs = ((part, part.view(f"u{values.itemsize}")) for part in parts)
    return all(a.max(initial=0) < infinity and int(b.max(initial=0)) < negative_infinity for a, b in pairs)
