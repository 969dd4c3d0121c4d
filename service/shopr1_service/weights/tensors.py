"""A model's tensors by their names in checkpoints, written to files and replaced in place.

In place, because a second copy of the weights would not fit beside the first: pieces go from a file into the
tensors that the model computes with. On a CPU the file is read directly into them.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.weights.files import AnonymousTempFile, OpenFile, Signature
from shopr1_service.weights.samples import sample_of

PIECE_BYTES = 4 * 2**20
"""Memory that each thread uses: small enough for its core's cache."""
_MAX_THREADS = 4

_Job = TypeVar("_Job")


@dataclass(frozen=True)
class TensorLocation:
    """A tensor in a file: its numbers from byte `start` on, row-major, without gaps.

    Attributes:
        sample: some of its numbers, as `sample_of` gives them, in the model's dtype.
    """

    file: OpenFile
    start: int
    dtype: torch.dtype
    sample: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class UpdateContents:
    """Contents of an update, to compare with those that another engine has loaded.

    Attributes:
        names: of tensors.
        files: of the checkpoint; empty if it was none.
        digest: of samples of the numbers.
    """

    names: frozenset[str]
    files: frozenset[Signature]
    digest: str = ""


class Weights:
    """The floating-point tensors of a model; others are not trained.

    Attributes:
        model: its owner.
        tensors: by name, one for each storage.
        aliases: further names of tied tensors, as `lm_head.weight` of the input embedding.

    Args:
        ignored: patterns of tensors, with wildcards as in file names, that checkpoints may have beside these.
    """

    def __init__(self, model: PreTrainedModel, ignored: Sequence[str] = ()) -> None:
        self.model = model
        self._ignored = ignored
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        owners: dict[int, str] = {}
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            owner = owners.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
            if owner == name:
                self.tensors[name] = tensor
            else:
                self.aliases[name] = owner

    def find(self, name: str) -> Tensor | None:
        """A tensor by any of its names."""
        return self.tensors.get(self.aliases.get(name, name))

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor of a checkpoint is left out: it is none of these, or tied to one of them."""
        return name not in self.tensors and is_ignored(name, self._ignored)

    def store(self, names: Collection[str], file: AnonymousTempFile) -> dict[str, TensorLocation]:
        """Write tensors to a file, in the model's dtype.

        Raises:
            StorageError: the disk is full or fails.
        """
        file.reserve(sum(self.tensors[name].nbytes for name in names))
        return {name: store(self.tensors[name], file) for name in names}

    def load(self, locations: Mapping[str, TensorLocation], on_piece: Callable[[], None]) -> None:
        """Replace tensors. If this fails, some have been replaced.

        Args:
            on_piece: called after every piece, on several threads.

        Raises:
            OSError: the disk fails.
        """
        buffers = Buffers()
        jobs = [job for name, location in locations.items() for job in _jobs(self.tensors[name], location)]

        def load(job: tuple[Tensor, TensorLocation, int]) -> None:
            _load(*job, buffers)
            on_piece()

        run_in_threads(load, jobs)

    def differing(self, locations: Mapping[str, TensorLocation]) -> list[str]:
        """Names of tensors that have other numbers than the samples of what they were loaded from."""
        return [
            name
            for name, location in locations.items()
            if location.sample is not None and not torch.equal(sample_of(self.tensors[name]), location.sample)
        ]


def store(tensor: Tensor, file: AnonymousTempFile) -> TensorLocation:
    """Append a tensor to a file.

    Raises:
        StorageError: the disk is full or fails.
    """
    start = file.num_bytes
    for piece in pieces(tensor, tensor.element_size()):
        file.append(bytes_of(piece.cpu()))
    return TensorLocation(file, start, tensor.dtype, sample_of(tensor))


def is_ignored(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns, with wildcards as in file names, matches a tensor's whole name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class Buffers(threading.local):
    """Memory of each thread for one piece."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def read(
        self, location: TensorLocation, first: int, num_elements: int, *, is_pinned: bool = False
    ) -> Tensor:
        """Elements of a tensor in the file's dtype; valid until the next call."""
        num_bytes = num_elements * location.dtype.itemsize
        if len(self._bytes) < num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        piece = self._bytes[:num_bytes]
        location.file.read_into(bytes_of(piece), location.start + first * location.dtype.itemsize)
        return piece.view(location.dtype)


def bytes_of(tensor: Tensor) -> memoryview:
    """Memory of a flat tensor on the CPU."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer


def pieces(tensor: Tensor, element_bytes: int) -> Iterator[Tensor]:
    """Flat views of a tensor, in order.

    Args:
        element_bytes: size of an element in the larger of the two dtypes of a copy.
    """
    if not tensor.is_contiguous():
        for row in tensor:
            yield from pieces(row, element_bytes)
        return
    flat = tensor.detach().view(-1)
    if flat.numel():
        yield from torch.split(flat, PIECE_BYTES // element_bytes)


def run_in_threads(work: Callable[[_Job], None], jobs: Sequence[_Job]) -> None:
    """Do all jobs. After one fails no other is started; all threads have ended when this raises."""
    # Threads take jobs themselves: a future for each would take longer than some jobs do.
    remaining = iter(jobs)

    def run() -> None:
        try:
            for job in remaining:
                work(job)
        finally:
            deque(remaining, maxlen=0)  # stops the other threads if this one has failed

    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads, "weights") as pool:
        futures = [pool.submit(run) for _ in range(num_threads)]
    for future in futures:
        future.result()


def _jobs(tensor: Tensor, location: TensorLocation) -> Iterator[tuple[Tensor, TensorLocation, int]]:
    """Pieces of a tensor, and the first element of each."""
    first = 0
    for piece in pieces(tensor, max(tensor.element_size(), location.dtype.itemsize)):
        yield piece, location, first
        first += piece.numel()


def _load(piece: Tensor, location: TensorLocation, first: int, buffers: Buffers) -> None:
    if piece.device.type == "cpu" and piece.dtype == location.dtype:
        location.file.read_into(bytes_of(piece), location.start + first * location.dtype.itemsize)
    else:
        piece.copy_(buffers.read(location, first, piece.numel(), is_pinned=piece.is_cuda))
