"""Strict reader of a safetensors header: which tensors follow it, and where.

    8 bytes   length of the text, little-endian
    text      {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …, "__metadata__": {…}}
    data      the tensors in row-major order, without gaps

The format's own library (https://github.com/huggingface/safetensors#format) opens whole files by path only,
not a header whose data are still to come. Most of its errors do not name the tensor; it accepts duplicate
keys (the last one counts), unknown fields and shapes that torch cannot have. It accepts all that is accepted
here.
"""

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shopr1_client.field_messages import plain_message

DtypeName = Literal["F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
DTYPES: Mapping[str, torch.dtype] = dict(
    zip(
        get_args(DtypeName),
        (
            *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        ),
        strict=True,
    )
)
"""Accepted dtypes, as safetensors spells them. Weights have fractions; old checkpoints have masks, too."""

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 * 2**20
MAX_NAME_CHARACTERS = 1024
MAX_DIGITS = 18
"""Limit of any size or offset: less than an exabyte, which fits into 64 bits even when counted in bits."""
MAX_DIMENSIONS = 64
"""Limit of torch."""

_METADATA = "__metadata__"


class HeaderError(ValueError):
    """Malformed or inconsistent header.

    Attributes:
        tensor: name of the wrong tensor; None where no single one is wrong.
    """

    def __init__(self, message: str, tensor: str | None = None) -> None:
        super().__init__(message if tensor is None else f"tensor {tensor!r}: {message}")
        self.tensor = tensor


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor and its byte range in the data: half-open, counted from the end of the header."""

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
    """Tensors in the order of their bytes, and metadata."""

    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Size of the data that follow."""
        return self.entries[-1].end if self.entries else 0


def header_length(first_8_bytes: bytes) -> int:
    """Length of the header's text, in [1, MAX_HEADER_BYTES].

    Raises:
        HeaderError: it is out of range; most files of other formats fail here.
    """
    if len(first_8_bytes) != LENGTH_BYTES:
        raise HeaderError(f"no safetensors header: it begins with {LENGTH_BYTES} bytes of length")
    length = int.from_bytes(first_8_bytes, "little")
    if not 0 < length <= MAX_HEADER_BYTES:
        # Not what it is: of another file, these are its first characters.
        raise HeaderError(f"no safetensors header: it begins with its length, at most {MAX_HEADER_BYTES:,}")
    return length


def parse_header(text: bytes) -> Header:
    """Parse and check a header's text.

    Raises:
        HeaderError: malformed; a tensor's byte range does not fit its shape, dtype and the tensors before it.
    """
    if not text.startswith(b"{"):
        raise HeaderError("no safetensors header: must begin with {")
    members = read_object(text)
    metadata = members.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{_METADATA} must be an object of strings")
    fields = [(name, _checked_fields(name, value)) for name, value in members.items()]
    # The sort is stable: empty tensors at the same byte keep the order of the text.
    fields.sort(key=lambda item: item[1].data_offsets)
    entries = lay_out((name, each.dtype, each.shape) for name, each in fields)
    for entry, (name, each) in zip(entries, fields, strict=True):
        if each.data_offsets != [entry.start, entry.end]:
            needed = f"shape, dtype and the tensors before it need {[entry.start, entry.end]}"
            raise HeaderError(f"data_offsets are {each.data_offsets}; {needed}", name)
    return Header(entries, metadata)


def lay_out(tensors: Iterable[tuple[str, DtypeName, Sequence[int]]]) -> tuple[TensorEntry, ...]:
    """Entries of tensors (name, dtype, shape) that follow each other without gaps.

    Raises:
        HeaderError: a tensor is too large.
    """
    entries, start = [], 0
    for name, dtype_name, shape in tensors:
        dtype = DTYPES[dtype_name]
        # An empty tensor needs strides that can be computed, too.
        num_bytes = dtype.itemsize * math.prod(max(size, 1) for size in shape)
        if num_bytes >= 10**MAX_DIGITS:
            raise HeaderError("a shape that no memory can hold", name)
        end = start + (0 if 0 in shape else num_bytes)
        entries.append(TensorEntry(name, dtype, tuple(shape), start, end))
        start = end
    return tuple(entries)


_Size = Annotated[int, Field(ge=0, lt=10**MAX_DIGITS)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: DtypeName
    shape: Annotated[list[_Size], Field(max_length=MAX_DIMENSIONS)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


def _checked_fields(name: str, fields: object) -> _Fields:
    if len(name) > MAX_NAME_CHARACTERS:
        raise HeaderError(f"a tensor's name has more than {MAX_NAME_CHARACTERS} characters")
    try:
        return _Fields.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise HeaderError(f"{place or 'fields'}: {plain_message(first)}", name) from None


def read_object(text: bytes) -> dict[str, Any]:
    """JSON object by RFC 8259, without duplicate keys.

    Numbers are sizes: null replaces one that is fractional, negative or has more than `MAX_DIGITS`.

    Raises:
        HeaderError: not such an object, or nested too deeply.
    """
    try:
        value = _DECODER.decode(text.decode())
    except UnicodeError as error:  # whose text quotes the bytes
        raise HeaderError("not JSON: not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise HeaderError("must be a JSON object")
    return value


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        [(duplicate, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {reprlib.repr(duplicate)}")
    for key, value in pairs:  # an escaped lone surrogate could not be written into an answer
        key.encode()
        if isinstance(value, str):
            value.encode()
    return members


def _size(digits: str) -> int | None:
    # Only Python takes -0 as a size; int() takes long for very long numbers.
    return int(digits) if len(digits) <= MAX_DIGITS and digits[0] != "-" else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_members,
    parse_int=_size,
    parse_float=lambda _: None,
    parse_constant=_refuse_constant,
)
