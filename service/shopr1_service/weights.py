"""A model's tensors by their names in checkpoints, written out and replaced in place.

In place, because a second copy of the weights would not fit beside the first: a piece at a time goes from a
private file into the tensors that the model computes with. On a CPU the file is read right into them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.private_file import PrivateFile

PIECE_BYTES = 16 * 2**20
"""What is held in memory at a time."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor's numbers stand, in the dtype and order in which the model has them."""

    file: PrivateFile
    start: int


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
        self._pinned = _piece_buffer(model.device)

    def store(self, names: Iterable[str], file: PrivateFile) -> dict[str, Stored]:
        """Write tensors out as they are.

        Raises:
            OSError: the disk is full or fails.
        """
        return {name: self._store(self.tensors[name], file) for name in names}

    @torch.inference_mode()
    def load(self, stored: Mapping[str, Stored], on_piece: Callable[[], None]) -> None:
        """Replace tensors. If it fails, some have been replaced.

        Args:
            on_piece: called again and again while it goes on.

        Raises:
            OSError: the disk fails.
        """
        for name, place in stored.items():
            start = place.start
            for piece in _pieces(self.tensors[name]):
                self._load_piece(piece, place.file, start)
                start += piece.nbytes
                on_piece()

    def _store(self, tensor: Tensor, file: PrivateFile) -> Stored:
        start = file.num_bytes
        for piece in _pieces(tensor):
            file.append(bytes_of(piece.cpu()))
        return Stored(file, start)

    def _load_piece(self, piece: Tensor, file: PrivateFile, start: int) -> None:
        if piece.device.type == "cpu":
            file.read_into(bytes_of(piece), start)
            return
        buffer = self._pinned[: piece.nbytes]
        file.read_into(bytes_of(buffer), start)
        piece.copy_(buffer.view(piece.dtype))


def bytes_of(tensor: Tensor) -> memoryview:
    """A flat tensor's memory, on a CPU."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer


def _piece_buffer(device: torch.device) -> Tensor:
    """Not needed on a CPU."""
    num_bytes = 0 if device.type == "cpu" else PIECE_BYTES
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's numbers in order, as flat views of it."""
    if not tensor.is_contiguous():
        for row in tensor:
            yield from _pieces(row)
        return
    flat = tensor.detach().view(-1)
    if flat.numel():
        yield from torch.split(flat, PIECE_BYTES // flat.element_size())
