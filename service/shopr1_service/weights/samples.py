"""Samples of the numbers that were checked, held against those that are loaded.

A checkpoint's file is read twice, to be checked and to be loaded. Usually its time shows that it was written
to in between; not if the writer sets the time back, or if a network's file system keeps old times.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

MAX_NUMBERS = 1024
"""Numbers of each tensor, at equal distances: training changes some of them in every tensor."""


class Sampler:
    """Collects samples of tensors that are read in pieces, on several threads."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[tuple[int, Tensor]]] = {}

    def add(self, name: str, piece: Tensor, first: int, num_elements: int) -> None:
        """Keep some numbers of a piece.

        Args:
            piece: flat, on the CPU, in the model's dtype.
            first: place of its first element in the tensor.
            num_elements: of the tensor.
        """
        step = _step(num_elements)
        some = piece[-first % step :: step].clone()
        self._pieces.setdefault(name, []).append((first, some))

    def sample(self, name: str) -> Tensor | None:
        """The numbers of a whole tensor; None if it was not read."""
        pieces = sorted(self._pieces.get(name, ()), key=lambda each: each[0])
        return torch.cat([some for _, some in pieces]) if pieces else None


def sample_of(tensor: Tensor) -> Tensor:
    """The same numbers of a tensor in memory, on the CPU."""
    return tensor.detach().reshape(-1)[:: _step(tensor.numel())].cpu()


def digest_of(samples: Mapping[str, Tensor]) -> str:
    """Hash of all samples: equal for equal weights in the same dtype."""
    digest = hashlib.sha256()
    for name, sample in sorted(samples.items()):
        digest.update(name.encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _step(num_elements: int) -> int:
    return max(1, -(-num_elements // MAX_NUMBERS))
