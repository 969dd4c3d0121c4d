"""New weights on their way into the policy: checked as they come, kept in a private file until the swap.

Names, shapes and dtypes are checked before a byte of the weights is taken, every number when it comes. What
is kept has the model's own dtype already, so that the swap has nothing to do but to copy.

A checkpoint's files are not copied: they are checked, held open, and read once more at the swap. If somebody
has written to them by then, it fails.
"""

import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from shopr1_client.errors import FieldError, InvalidWeightsError, StorageError
from shopr1_service.field_errors import raise_if_any
from shopr1_service.weights.files import AnonymousTempFile, CheckpointFile
from shopr1_service.weights.safetensors_header import TensorEntry
from shopr1_service.weights.tensors import PIECE_BYTES, Buffers, Stored, Weights, bytes_of, on_threads

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a number."""
_CHECKED_BYTES = 2**20
"""At a time: they are read twice, and a core finds them in its own cache again."""


class Stage:
    """Takes the tensors of one update, in the order in which they were announced.

    Args:
        directory: where the private file is.
        is_partial: the model's other tensors stay as they are.

    Raises (every method):
        InvalidWeightsError: these are no weights of this policy.
        StorageError: there is no room.
    """

    def __init__(self, weights: Weights, directory: Path | None, *, is_partial: bool) -> None:
        self.num_bytes = 0
        """That have come."""
        self.num_announced_bytes = 0
        self.stored: dict[str, Stored] = {}
        self._is_discarded = False
        self._weights = weights
        self._is_partial = is_partial
        self._file = _new_file(directory)
        self._coming: deque[TensorEntry] = deque()
        self._names: set[str] = set()
        self._buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        self._num_buffered = 0
        self._num_taken = 0  # of the tensor that is coming
        self._counting = threading.Lock()

    def announce(self, entries: Sequence[TensorEntry]) -> None:
        """All that will come, in this order. To be called once, before anything comes."""
        errors = []
        for entry in entries:
            if (error := self._flaw(entry)) is not None:
                errors.append(error)
            self._names.add(entry.name)
        if not self._is_partial:
            errors += self._missing()
        raise_if_any(errors, InvalidWeightsError)
        if not entries:
            raise InvalidWeightsError("there are no tensors")
        self._coming.extend(entries)
        self.num_announced_bytes = sum(entry.num_bytes for entry in entries)
        self._skip_empty()

    def feed(self, block: memoryview) -> None:
        """Bytes of the tensors, wherever they are cut."""
        while block:
            if not self.num_bytes:
                self._reserve()
            if not self._coming:
                raise InvalidWeightsError(f"{len(block)} bytes more than the header announces")
            entry = self._coming[0]
            room = min(PIECE_BYTES - self._num_buffered, entry.num_bytes - self._num_taken)
            part, block = block[:room], block[room:]
            self._num_taken += len(part)
            self.num_bytes += len(part)
            if not self._num_buffered and (values := _numbers(part, entry.dtype)) is not None:
                self._keep_piece(entry, values)
            else:
                self._collect(entry, part)

    def refer(self, file: CheckpointFile, data_start: int, entries: Sequence[TensorEntry]) -> None:
        """Take the tensors that come next from where they stand in a file."""
        buffers = Buffers()
        places = [(entry, Stored(file, data_start + entry.start, entry.dtype)) for entry in entries]
        jobs = [(*place, *part) for place in places for part in _parts(place[0])]
        on_threads(lambda job: self._check_part(*job, buffers), jobs)
        for entry, place in places:
            self.stored[entry.name] = place
            if entry.num_bytes:
                assert self._coming.popleft() is entry
                self._skip_empty()

    def end(self) -> None:
        """Nothing more comes of what was announced."""
        if self._coming:
            num_missing = self.num_announced_bytes - self.num_bytes
            raise InvalidWeightsError(
                f"the weights end {num_missing} bytes too early, in {self._coming[0].name}",
            )

    def finish(self) -> Mapping[str, Stored]:
        """All has come: where it is (`stored`), by the names under which the model has it."""
        self.end()
        try:
            self._check_ties()
        except OSError as error:
            raise no_room(error) from error
        return self.stored

    def discard(self) -> None:
        """Give the room back: nothing of it is wanted, and what `refer` reads is not read to its end."""
        self._is_discarded = True
        self._file.discard()

    def _flaw(self, entry: TensorEntry) -> FieldError | None:
        tensor = self._weights.named(entry.name)
        if tensor is None:
            return {"location": entry.name, "message": "the policy has no such tensor"}
        if entry.name in self._names:
            return {"location": entry.name, "message": "it comes twice"}
        if entry.shape != tuple(tensor.shape):
            message = f"its shape is {list(entry.shape)}, the policy's {list(tensor.shape)}"
            return {"location": entry.name, "message": message}
        return None

    def _reserve(self) -> None:
        tensors = [self._weights.named(entry.name) for entry in self._coming]
        try:
            self._file.reserve(sum(tensor.nbytes for tensor in tensors if tensor is not None))
        except OSError as error:
            raise no_room(error) from error

    def _collect(self, entry: TensorEntry, part: memoryview) -> None:
        """Take a copy, until it is worth keeping."""
        bytes_of(self._buffer)[self._num_buffered : self._num_buffered + len(part)] = part
        self._num_buffered += len(part)
        if self._num_buffered == PIECE_BYTES or self._num_taken == entry.num_bytes:
            values = self._buffer[: self._num_buffered].view(entry.dtype)
            self._num_buffered = 0
            self._keep_piece(entry, values)

    def _keep_piece(self, entry: TensorEntry, values: torch.Tensor) -> None:
        """Check numbers of the tensor that is coming, and write them down."""
        own = self._checked(entry, values)
        try:
            start = self._file.append(bytes_of(own))
        except OSError as error:
            raise no_room(error) from error
        self.stored.setdefault(entry.name, Stored(self._file, start, own.dtype))
        if self._num_taken == entry.num_bytes:
            self._coming.popleft()
            self._num_taken = 0
            self._skip_empty()

    def _check_part(
        self, entry: TensorEntry, place: Stored, first: int, num_numbers: int, buffers: Buffers
    ) -> None:
        if self._is_discarded:
            raise InvalidWeightsError("nobody wants these weights any more")
        values = buffers.read(place, first, num_numbers)
        self._checked(entry, values)
        with self._counting:
            self.num_bytes += values.nbytes

    def _checked(self, entry: TensorEntry, values: torch.Tensor) -> torch.Tensor:
        """Numbers as the model will have them."""
        tensor = self._weights.named(entry.name)
        assert tensor is not None
        own = values.to(tensor.dtype)
        if not _is_finite(own):
            is_finite = bool(values.double().isfinite().all())
            what = f"values too large for {own.dtype}" if is_finite else "NaN or infinite values"
            raise_if_any([{"location": entry.name, "message": what}], InvalidWeightsError)
        return own

    def _skip_empty(self) -> None:
        while self._coming and not self._coming[0].num_bytes:
            entry = self._coming.popleft()
            self.stored[entry.name] = Stored(self._file, 0, entry.dtype)

    def _missing(self) -> list[FieldError]:
        given = {self._weights.aliases.get(name, name) for name in self._names}
        missing = [name for name in self._weights.tensors if name not in given]
        return [{"location": name, "message": "it is missing"} for name in missing]

    def _check_ties(self) -> None:
        """Of tensors that are one in the model, one stays; they must not differ."""
        for alias, owner in self._weights.aliases.items():
            if (twin := self.stored.pop(alias, None)) is None:
                continue
            if (own := self.stored.setdefault(owner, twin)) is not twin and not self._is_equal(
                own, twin, owner
            ):
                message = f"it differs from {owner}, with which it is one in the policy"
                raise_if_any([{"location": alias, "message": message}], InvalidWeightsError)

    def _is_equal(self, some: Stored, others: Stored, name: str) -> bool:
        tensor, some_buffers, other_buffers = self._weights.tensors[name], Buffers(), Buffers()
        step = PIECE_BYTES // max(some.dtype.itemsize, others.dtype.itemsize)
        for first in range(0, tensor.numel(), step):
            num_numbers = min(step, tensor.numel() - first)
            own = some_buffers.read(some, first, num_numbers).to(tensor.dtype)
            if not torch.equal(own, other_buffers.read(others, first, num_numbers).to(tensor.dtype)):
                return False
        return True


def _parts(entry: TensorEntry) -> Iterator[tuple[int, int]]:
    """First number and length of what is checked at a time."""
    num_numbers = entry.num_bytes // entry.dtype.itemsize
    step = PIECE_BYTES // entry.dtype.itemsize
    return ((first, min(step, num_numbers - first)) for first in range(0, num_numbers, step))


def _new_file(directory: Path | None) -> AnonymousTempFile:
    try:
        return AnonymousTempFile(directory)
    except OSError as error:
        raise no_room(error) from error


def _numbers(part: memoryview, dtype: torch.dtype) -> torch.Tensor | None:
    """The same memory as numbers; None if it does not lie so that they can be read there."""
    if part.readonly or len(part) % dtype.itemsize:
        return None
    numbers = torch.frombuffer(part, dtype=torch.uint8)
    return None if numbers.data_ptr() % dtype.itemsize else numbers.view(dtype)


def _is_finite(values: torch.Tensor) -> bool:
    # Read as integers, infinity and NaN are the largest numbers of each sign. NumPy finds those at the speed
    # of memory, and on one thread: torch's would wait for each other, beside the engine.
    integer = _INTEGERS[values.itemsize]
    infinity = int(torch.tensor(math.inf, dtype=values.dtype).view(integer))
    negative_infinity = infinity + (1 << (8 * values.itemsize - 1))
    parts = (part.numpy() for part in torch.split(values.view(integer), _CHECKED_BYTES // values.itemsize))
    pairs = ((part, part.view(f"u{values.itemsize}")) for part in parts)
    return all(a.max(initial=0) < infinity and int(b.max(initial=0)) < negative_infinity for a, b in pairs)


def no_room(error: OSError) -> StorageError:
    return StorageError(f"the new weights cannot be kept in staging_dir: {error.strerror or error}")
