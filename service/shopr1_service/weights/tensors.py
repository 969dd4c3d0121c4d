"""A model's tensors by their names in checkpoints, written out and replaced in place.

In place, because a second copy of the weights would not fit beside the first: a piece at a time goes from a
file into the tensors that the model computes with. On a CPU the file is read right into them.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.weights.files import AnonymousTempFile, OpenFile, Signature

PIECE_BYTES = 4 * 2**20
"""What is held in memory at a time, by each thread: so little that a core finds it in its cache again."""
_MAX_THREADS = 4

_Given = TypeVar("_Given")


@dataclass(frozen=True)
class Stored:
    """Where a tensor's numbers stand, row by row, without gaps."""

    file: OpenFile
    start: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Taken:
    """What an update brought.

    Attributes:
        names: of tensors.
        files: of the checkpoint, if it was one.
    """

    names: frozenset[str]
    files: frozenset[Signature]

    @classmethod
    def of(cls, stored: Mapping[str, Stored]) -> "Taken":
        signatures = {place.file.signature for place in stored.values()}
        return cls(frozenset(stored), frozenset(each for each in signatures if each is not None))


class Weights:
    """See the module.

    Attributes:
        tensors: of the model, one for each storage; floating point only, as nothing else is trained.
        aliases: further names of those that are tied, as `lm_head.weight` to the input embedding.
    """

    def __init__(self, model: PreTrainedModel) -> None:
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

    def named(self, name: str) -> Tensor | None:
        """A tensor by any of its names."""
        return self.tensors.get(self.aliases.get(name, name))

    def store(self, names: Collection[str], file: AnonymousTempFile) -> dict[str, Stored]:
        """Write tensors out as they are.

        Raises:
            OSError: the disk is full or fails.
        """
        file.reserve(sum(self.tensors[name].nbytes for name in names))
        return {name: self._store(self.tensors[name], file) for name in names}

    def load(self, stored: Mapping[str, Stored], on_piece: Callable[[], None]) -> None:
        """Replace tensors. If it fails, some have been replaced.

        Args:
            on_piece: called again and again while it goes on, on several threads.

        Raises:
            OSError: the disk fails.
        """
        buffers = Buffers()
        jobs = [job for name, place in stored.items() for job in _jobs(self.tensors[name], place)]

        def load(job: tuple[Tensor, Stored, int]) -> None:
            _load(*job, buffers)
            on_piece()

        on_threads(load, jobs)

    def _store(self, tensor: Tensor, file: AnonymousTempFile) -> Stored:
        start = file.num_bytes
        for piece in pieces(tensor, tensor.element_size()):
            file.append(bytes_of(piece.cpu()))
        return Stored(file, start, tensor.dtype)


class Buffers(threading.local):
    """Memory that a thread reads a piece into."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def read(self, place: Stored, first: int, num_numbers: int, *, is_pinned: bool = False) -> Tensor:
        """Some of a tensor's numbers, in the dtype in which they are stored; until the next call."""
        num_bytes = num_numbers * place.dtype.itemsize
        if len(self._bytes) < num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        numbers = self._bytes[:num_bytes]
        place.file.read_into(bytes_of(numbers), place.start + first * place.dtype.itemsize)
        return numbers.view(place.dtype)


def bytes_of(tensor: Tensor) -> memoryview:
    """A flat tensor's memory, on a CPU."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer


def pieces(tensor: Tensor, number_bytes: int) -> Iterator[Tensor]:
    """A tensor's numbers in order, as flat views of it.

    Args:
        number_bytes: what one of them takes where the most memory is needed for it.
    """
    if not tensor.is_contiguous():
        for row in tensor:
            yield from pieces(row, number_bytes)
        return
    flat = tensor.detach().view(-1)
    if flat.numel():
        yield from torch.split(flat, PIECE_BYTES // number_bytes)


def on_threads(work: Callable[[_Given], None], jobs: Sequence[_Given]) -> None:
    """Do all jobs. When one fails, nothing more is begun, and nothing goes on when this raises."""
    # Each thread takes its next job by itself: to be handed one, and to hand over what comes of it, takes
    # longer than some jobs do.
    waiting = iter(jobs)

    def run() -> None:
        try:
            for job in waiting:
                work(job)
        finally:
            deque(waiting, maxlen=0)  # none is left, unless this one has failed

    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads, "weights") as pool:
        threads = [pool.submit(run) for _ in range(num_threads)]
    for thread in threads:
        thread.result()


def _jobs(tensor: Tensor, place: Stored) -> Iterator[tuple[Tensor, Stored, int]]:
    """Pieces of a tensor, and the first number of each."""
    first = 0
    for piece in pieces(tensor, max(tensor.element_size(), place.dtype.itemsize)):
        yield piece, place, first
        first += piece.numel()


def _load(piece: Tensor, place: Stored, first: int, buffers: Buffers) -> None:
    if piece.device.type == "cpu" and piece.dtype == place.dtype:
        place.file.read_into(bytes_of(piece), place.start + first * place.dtype.itemsize)
    else:
        piece.copy_(buffers.read(place, first, piece.numel(), is_pinned=piece.is_cuda))
