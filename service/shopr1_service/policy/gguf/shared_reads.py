"""Read a GGUF file once for all the callers in transformers, and in larger steps.

Transformers reads the fields for the tokenizer, the config and the weights, each time in Python, string by
string, and builds the map of tensor names again for every module of the model. Each slice of `np.memmap`, and
each of its bytes in a loop, costs microseconds that one of a plain array does not; and blocks are unpacked 16
rows at a time. The results are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
from transformers import modeling_gguf_pytorch_utils as legacy_reader
from transformers.integrations.gguf import reader

_STRING = 8
"""Number of the type in the format."""
_ROWS_AT_A_TIME = 256
"""Rows of blocks to unpack: few calls, and intermediate results that fit into the processor's cache."""

Array = np.ndarray[Any, np.dtype[Any]]


@contextmanager
def shared_reads() -> Iterator[None]:
    """Remember readers and name maps of the `gguf` package until the end of the block."""
    import gguf  # slow to import, and only needed for these files
    from gguf import quants

    with ExitStack() as replacements:
        for module, name, make in (
            (gguf, "GGUFReader", lambda kind: cache(_plain_reader(kind))),
            (gguf, "get_tensor_name_map", cache),
            (quants, "_apply_over_grouped_rows", lambda _: _apply_to_rows),
            (reader, "_mapped", lambda _: _map_plain),
            (legacy_reader, "_gguf_parse_value", _value_parser),
        ):
            replacements.enter_context(_replaced(module, name, make))
        yield


@contextmanager
def _replaced(module: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:  # noqa: ANN401
    """Replace a name in a module by what `make` makes of it. A version without it only reads more slowly."""
    original = getattr(module, name, None)
    if original is None:
        yield
        return
    setattr(module, name, make(original))
    try:
        yield
    finally:
        setattr(module, name, original)


def _map_plain(path: str) -> Array:
    return _plain(np.memmap(path, mode="r", dtype=np.uint8))


def _plain(mapped: Array) -> Array:
    """The same mapping as a plain array."""
    return mapped.view(np.ndarray)


def _plain_reader(kind: Any) -> Any:  # noqa: ANN401
    class PlainReader(kind):  # type: ignore[misc]
        """A `GGUFReader` whose fields are plain arrays."""

        @property
        def data(self) -> Array:
            return self._data

        @data.setter
        def data(self, mapped: Array) -> None:
            self._data = _plain(mapped)

    return PlainReader


def _value_parser(parse: Callable[[Array, Any], Any]) -> Callable[[Array, Any], Any]:
    """Transformers' parser of a field's value, which takes strings as a whole."""

    def parse_value(value: Array, types: Any) -> Any:  # noqa: ANN401
        is_string = isinstance(types, list) and types[-1] == _STRING
        return value.tobytes().decode() if is_string else parse(value, types)

    return parse_value


def _apply_to_rows(
    unpack: Callable[[Array], Array], arr: Array, otype: type, oshape: tuple[int, ...]
) -> Array:
    """Unpack an array of blocks, many rows at a time (a `quants._apply_over_grouped_rows`)."""
    rows = arr.reshape((-1, arr.shape[-1]))
    unpacked: Array = np.empty((len(rows), oshape[-1]), otype)
    for first in range(0, len(rows), _ROWS_AT_A_TIME):
        some = rows[first : first + _ROWS_AT_A_TIME]
        unpacked[first : first + len(some)] = unpack(some).reshape((len(some), -1))
    return unpacked.reshape(oshape)
