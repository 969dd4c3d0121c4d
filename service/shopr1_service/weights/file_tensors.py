"""Tensors of a safetensors file as a mapping: each is read when it is asked for, and not kept."""

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from shopr1_service.weights.files import OpenFile
from shopr1_service.weights.safetensors_header import Header
from shopr1_service.weights.tensors import Buffers, TensorLocation


class FileTensors(Mapping[str, Tensor]):
    """Tensors by name, in the order of their names.

    Args:
        data_start: first byte of the tensors in the file.

    Raises (access to a tensor):
        OSError: the disk fails, or the file is too short.
    """

    def __init__(self, file: OpenFile, header: Header, data_start: int = 0) -> None:
        self._file = file
        self._entries = {entry.name: entry for entry in sorted(header.entries, key=lambda each: each.name)}
        self._data_start = data_start

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        location = TensorLocation(self._file, self._data_start + entry.start, entry.dtype)
        return Buffers().read(location, 0, math.prod(entry.shape)).view(entry.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
