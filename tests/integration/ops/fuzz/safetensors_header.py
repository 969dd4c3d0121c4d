"""Fuzzes the parsing of safetensors headers: accepted headers are parsed like by the safetensors library."""

import json
import math
import random
import sys
from typing import Any

import atheris

with atheris.instrument_imports(include=["shopr1_service.weights.safetensors_header"]):
    from shopr1_service.weights.safetensors_header import (
        DTYPES,
        LENGTH_BYTES,
        Header,
        HeaderError,
        header_length,
        parse_header,
    )

import safetensors

from tests.integration.ops.fuzz.harness import fuzz

MAX_DATA_BYTES = 2**20
SEEDS = (
    b'{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    b'"b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}}',
    '{"":{"dtype":"F64","shape":[0,7],"data_offsets":[0,0]},'
    '"é":{"dtype":"F16","shape":[1,1,1],"data_offsets":[0,2]}}'.encode(),
    b'{"b":{"shape":[2],"data_offsets":[4,8],"dtype":"BF16"},\n'
    b'"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}} ',
    b'{"w":{"dtype":"F32","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}}',
    b'{"w":{"dtype":"F32","shape":[-0,1.0,1e3,true],"data_offsets":[0,0]}}',
    b'{"w":{"dtype":"I8","shape":[1],"data_offsets":[0,1],"more":{}}}',
    b'{"__metadata__":{"a":"\\ud800","a":"\\ud83d\\ude00"},"__metadata__":null}',
    b'{"w":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}',
    b"{}",
    b'{"w":[[[[NaN]]]]}',
)


GRAFTS = (
    b"",
    b"0",
    b"-",
    b".0",
    b"1e9",
    b"9" * 18,
    b"true",
    b'"F32"',
    b'"w":{},',
    b"{}",
    b"[",
    b"\\ud800",
    b" ",
    b",",
)


def check(data: bytes) -> None:
    """Parse the bytes themselves or, if the first is even, a header generated from them."""
    text = data[1:] if data[:1] and data[0] % 2 else written(data[1:])
    check_length(text[:LENGTH_BYTES])
    try:
        header = parse_header(text)
    except HeaderError as error:
        check_message(error)
        return
    if header.num_bytes <= MAX_DATA_BYTES:
        check_library(header, text)


def written(data: bytes) -> bytes:
    """A header of some tensors with at most one damaged place."""
    source = atheris.FuzzedDataProvider(data)
    members, start = {}, 0
    for number in range(source.ConsumeIntInRange(0, 3)):
        name, dtype = source.ConsumeUnicode(4) * number, source.PickValueInList(list(DTYPES))
        shape = source.ConsumeIntListInRange(source.ConsumeIntInRange(0, 3), 0, 9)
        end = start + math.prod(shape) * DTYPES[dtype].itemsize
        members[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(members).encode()
    place, num_dropped = source.ConsumeIntInRange(0, len(text)), source.ConsumeIntInRange(0, 3)
    graft: bytes = source.PickValueInList(list(GRAFTS))
    return text[:place] + graft + text[place + num_dropped :]


def check_length(first: bytes) -> None:
    try:
        assert header_length(first).to_bytes(LENGTH_BYTES, "little") == first
    except HeaderError as error:
        check_message(error)


def check_message(error: HeaderError) -> None:
    """Assert that the message can be sent in a response."""
    assert str(error).encode()
    assert error.tensor is None or error.tensor.encode() is not None


def check_library(header: Header, text: bytes) -> None:
    file = len(text).to_bytes(LENGTH_BYTES, "little") + text + bytes(header.num_bytes)
    read: dict[str, Any] = dict(safetensors.deserialize(file))  # type: ignore[no-untyped-call]
    assert {entry.name for entry in header.entries} == read.keys()
    for entry in header.entries:
        tensor = read[entry.name]
        assert (DTYPES[tensor["dtype"]], tuple(tensor["shape"])) == (entry.dtype, entry.shape)
        assert len(tensor["data"]) == entry.num_bytes


def main() -> int:
    of_numbers = [b"\0" + random.Random(number).randbytes(64) for number in range(50)]
    fuzz(check, [*(b"\1" + seed for seed in SEEDS), *of_numbers])
    return 0


if __name__ == "__main__":
    sys.exit(main())
