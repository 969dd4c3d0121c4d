"""The header of a safetensors file: which tensors follow it, and where.

    8 bytes   length of the text, little-endian
    text      {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …, "__metadata__": {…}}
    data      the tensors in row-major order, without holes

A header is believed by whoever allocates and copies after it. So all of it is checked here, and more strictly
than the format's own library does: https://github.com/huggingface/safetensors#format
"""

import json
import math
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""What weights come in, as safetensors spells it."""

LENGTH_BYTES = 8
"""What stands in front of the header's text."""
MAX_HEADER_BYTES = 16 * 2**20
MAX_NAME_CHARACTERS = 1024
MAX_DIGITS = 18
"""Of any size or offset: less than an exabyte, which no arithmetic of 64 bits overflows, in bits neither."""
MAX_DIMENSIONS = 64
"""As many as torch can compute with."""

_ALIGNMENT_BYTES = 8
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}


class HeaderError(ValueError):
    """A header that is no safetensors header, or lies.

    Attributes:
        tensor: the name of the tensor that is wrong; None where it is not one.
    """

    def __init__(self, message: str, tensor: str | None = None) -> None:
        super().__init__(message if tensor is None else f"tensor {tensor!r}: {message}")
        self.tensor = tensor


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor, and its bytes in the section of data: half-open, counted from the header's end."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a header says; the tensors in the order of their bytes."""

    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Of the data that follow it."""
        return self.entries[-1].end if self.entries else 0


def header_length(first_8_bytes: bytes) -> int:
    """How many bytes the header's text has, in [1, MAX_HEADER_BYTES].

    Raises:
        HeaderError: it has none or too many; what is no safetensors file mostly shows here.
    """
    if len(first_8_bytes) != LENGTH_BYTES:
        raise HeaderError(f"no safetensors header: it begins with {LENGTH_BYTES} bytes of length")
    length = int.from_bytes(first_8_bytes, "little")
    if not 0 < length <= MAX_HEADER_BYTES:
        raise HeaderError(
            f"no safetensors header: a length of {length:,} bytes; {MAX_HEADER_BYTES:,} at most"
        )
    return length


def parse_header(text: bytes) -> Header:
    """The header with this text, without the length in front.

    Tensors lie without holes from byte 0 on, and each has as many bytes as its shape and dtype need. A name
    has at most `MAX_NAME_CHARACTERS`.

    Raises:
        HeaderError: anything about it is not so.
    """
    if not text.startswith(b"{"):
        raise HeaderError("no safetensors header: must begin with {")
    members = read_object(text)
    metadata = _metadata(members.pop(_METADATA, {}))
    entries = [_entry(name, fields) for name, fields in members.items()]
    # Empty tensors that lie at the same byte stay in the order of the text.
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_contiguous(entries)
    return Header(tuple(entries), metadata)


def build_header(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The length and the text of a header, of which data can follow in this order.

    Args:
        tensors: name, dtype as in `DTYPES`, and shape of each.

    Raises:
        HeaderError: `parse_header` or `header_length` would refuse it.
    """
    members: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    start = 0
    for name, dtype, shape in tensors:
        if name in members:
            raise HeaderError("stands twice", name)
        end = start + _num_bytes(name, shape, _dtype(name, dtype))
        members[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(members, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    length = len(text).to_bytes(LENGTH_BYTES, "little")
    header_length(length)
    parse_header(text)
    return length + text


def read_object(text: bytes) -> dict[str, Any]:
    """The JSON object in `text`, by RFC 8259 and with no key twice.

    Numbers are sizes: null stands for what is fractional, negative or has more than `MAX_DIGITS`.

    Raises:
        HeaderError: it is none, or is nested too deep for any that is wanted.
    """
    try:
        value = _DECODER.decode(text.decode())
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise HeaderError("must be a JSON object")
    return value


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {reprlib.repr(twice)} stands twice")
    for key, value in pairs:  # half surrogate pairs can be escaped, and then nobody can write them out again
        key.encode()
        if isinstance(value, str):
            value.encode()
    return members


def _size(digits: str) -> int | None:
    # -0 is a size for Python alone, and int() takes long for long numbers.
    return int(digits) if len(digits) <= MAX_DIGITS and digits[0] != "-" else None


def _no_size(_text: str) -> None:
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_members, parse_int=_size, parse_float=_no_size, parse_constant=_refuse_constant
)


def _metadata(members: object) -> dict[str, str]:
    if not isinstance(members, dict) or not all(isinstance(value, str) for value in members.values()):
        raise HeaderError(f"{_METADATA} must be an object of strings")
    return members


def _entry(name: str, fields: object) -> TensorEntry:
    if len(name) > MAX_NAME_CHARACTERS:
        raise HeaderError(f"a tensor's name has more than {MAX_NAME_CHARACTERS} characters")
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise HeaderError("must have dtype, shape and data_offsets and nothing else", name)
    dtype = _dtype(name, fields["dtype"])
    shape, offsets = _sizes(name, fields, "shape"), _sizes(name, fields, "data_offsets")
    if len(offsets) != 2:
        raise HeaderError("data_offsets must be two numbers", name)
    start, end = offsets
    if (num_bytes := _num_bytes(name, shape, dtype)) != end - start:
        raise HeaderError(f"shape and dtype need {num_bytes} bytes, data_offsets have {end - start}", name)
    return TensorEntry(name, dtype, shape, start, end)


def _dtype(name: str, dtype: object) -> torch.dtype:
    known = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        taken = ", ".join(DTYPES)
        raise HeaderError(
            f"dtype {reprlib.repr(dtype)} is not taken, only {taken}: no quantised weights", name
        )
    return known


def _sizes(name: str, fields: Mapping[str, Any], key: str) -> tuple[int, ...]:
    sizes = fields[key]
    # By type: True is an int too.
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
        raise HeaderError(f"{key} must be whole numbers, not negative, of at most {MAX_DIGITS} digits", name)
    return tuple(sizes)


def _num_bytes(name: str, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Of a tensor. Also one that a 0 makes empty must have a shape whose strides can be computed."""
    if len(shape) > MAX_DIMENSIONS:
        raise HeaderError(f"a shape of {len(shape)} dimensions; {MAX_DIMENSIONS} at most", name)
    num_bytes = dtype.itemsize * math.prod(max(size, 1) for size in shape)
    if num_bytes >= 10**MAX_DIGITS:
        raise HeaderError("a shape that no memory can hold", name)
    return 0 if 0 in shape else num_bytes


def _check_contiguous(entries: Sequence[TensorEntry]) -> None:
    position = 0
    for entry in entries:
        if entry.start != position:
            flaw = "overlaps the one before" if entry.start < position else "leaves a hole before it"
            raise HeaderError(f"{flaw}: begins at byte {entry.start}, not at {position}", entry.name)
        position = entry.end
