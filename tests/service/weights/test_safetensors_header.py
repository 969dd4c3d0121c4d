"""Headers are parsed as the format's own library parses them, or refused."""

import json
import random
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from shopr1_service.weights.safetensors_header import (
    DTYPES,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Header,
    HeaderError,
    TensorEntry,
    header_length,
    lay_out,
    parse_header,
)

Spec = tuple[str, str, list[int]]

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=4)
specs = st.lists(
    st.tuples(names, st.sampled_from(list(DTYPES)), shapes), max_size=5, unique_by=lambda spec: spec[0]
)
metadata = st.none() | st.dictionaries(names, names, max_size=3)


def file_of(text: bytes, num_bytes: int) -> bytes:
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + bytes(num_bytes)


def check_library(header: Header, text: bytes) -> None:
    """The library accepts the header, too, and reads the same tensors."""
    read: dict[str, Any] = dict(
        safetensors.deserialize(file_of(text, header.num_bytes))  # type: ignore[no-untyped-call]
    )
    assert {entry.name for entry in header.entries} == read.keys()
    for entry in header.entries:
        tensor = read[entry.name]
        assert (DTYPES[tensor["dtype"]], tensor["shape"]) == (entry.dtype, list(entry.shape))
        assert len(tensor["data"]) == entry.num_bytes


def refused(text: bytes | str) -> HeaderError:
    with pytest.raises(HeaderError) as caught:
        parse_header(text if isinstance(text, bytes) else text.encode())
    assert str(caught.value).encode()
    return caught.value


def one(**changed: Any) -> str:
    """A header of one tensor of 24 bytes, with other fields."""
    fields = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changed
    return json.dumps({"w": fields})


# --- against the library ----------------------------------------------------------------------------


def text_of(tensors: list[Spec]) -> str:
    """A header of tensors (name, dtype, shape) that follow each other."""
    members, start = {}, 0
    for name, dtype, shape in tensors:
        end = start + torch.empty(shape, dtype=DTYPES[dtype]).nbytes
        members[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    return json.dumps(members)


@given(specs)
def test_tensors_are_laid_out_as_a_header_says(tensors: list[Spec]) -> None:
    text = text_of(tensors).encode()
    header = parse_header(text)
    assert header.entries == lay_out(cast("Any", tensors))
    assert [(each.name, each.dtype, list(each.shape)) for each in header.entries] == [
        (name, DTYPES[dtype], shape) for name, dtype, shape in tensors
    ]
    check_library(header, text)


@settings(max_examples=50)
@given(tensors=specs, given_metadata=metadata)
def test_files_of_the_library_are_parsed(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[Spec], given_metadata: dict[str, str] | None
) -> None:
    assume(tensors or given_metadata != {})  # the library cannot read what it writes of neither
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    written = {name: torch.randn(shape).to(DTYPES[dtype]) for name, dtype, shape in tensors}
    safetensors.torch.save_file(written, path, given_metadata)
    content = path.read_bytes()
    data_start = LENGTH_BYTES + header_length(content[:LENGTH_BYTES])
    header = parse_header(content[LENGTH_BYTES:data_start])
    assert header.metadata == (given_metadata or {})
    assert {entry.name for entry in header.entries} == written.keys()
    assert data_start + header.num_bytes == len(content)
    for entry in header.entries:
        tensor = written[entry.name]
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        data = content[data_start + entry.start : data_start + entry.end]
        assert data == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


ODD_VALUES = (
    *("-0", "-1", "1.0", "1e1", "01", "+1", "9" * 18, "9" * 19, "9" * 5000, "NaN", "Infinity", "1e999"),
    *("true", "null", '""', '"F32"', '"F16"', '"I8"', '"\\ud800"', '"\\u0046\\u00332"', "{}", '{"a": "b"}'),
    *("[]", "[0]", "[1]", "[0, 0]", "[0, 4]", "[4, 8]", "[1, 2]", "[true, 4]", "[0, 4, 4]", "[[0, 4]]"),
    *("[4611686018427387904, 4, 0]", "[0, 4611686018427387904, 4]", "[" * 2000),
)
ODD_KEYS = (
    '"w"',
    '"v"',
    '"__metadata__"',
    '"dtype"',
    '"shape"',
    '"data_offsets"',
    '"more"',
    '"\\u0077"',
    '""',
)
odd = st.sampled_from(ODD_VALUES)


@st.composite
def odd_texts(draw: st.DrawFn) -> str:
    """Headers whose members are in any order, duplicated or dropped, with odd values between valid ones."""
    tensors = draw(st.lists(st.tuples(names, st.sampled_from(list(DTYPES)), shapes), max_size=3))
    members, start = [], 0
    for name, dtype, shape in tensors:
        end = start + torch.empty(shape, dtype=DTYPES[dtype]).nbytes
        fields = [("dtype", json.dumps(dtype)), ("shape", str(shape)), ("data_offsets", f"[{start}, {end}]")]
        members.append((json.dumps(name), draw(changed([(json.dumps(key), value) for key, value in fields]))))
        start = end
    return draw(changed(members)) + draw(st.sampled_from(["", "", " ", "\n", "\0", "{}"]))


@st.composite
def changed(draw: st.DrawFn, members: list[tuple[str, str]]) -> str:
    members = draw(st.permutations(members))
    if draw(st.integers(0, 5)) == 0:
        members = [*members, (draw(st.sampled_from(ODD_KEYS)), draw(odd))]
    if members and draw(st.integers(0, 5)) == 0:
        at = draw(st.integers(0, len(members) - 1))
        members = [*members[:at], (members[at][0], draw(odd)), *members[at + 1 :]]
    comma = draw(st.sampled_from([",", ", ", "\t,\r\n"]))
    return "{" + comma.join(f"{key}: {value}" for key, value in members) + "}"


@settings(max_examples=500)
@given(odd_texts())
@example("{}")
@example('{"__metadata__": {}}')
def test_the_library_accepts_every_accepted_header(text: str) -> None:
    try:
        header = parse_header(text.encode())
    except HeaderError as error:
        f"{error}{error.tensor}".encode()  # it is returned to the client
    else:
        check_library(header, text.encode())


def test_some_odd_texts_are_accepted_and_some_refused() -> None:
    # Otherwise the test above would show little.
    @settings(max_examples=1000)
    @given(odd_texts())
    def count(text: str) -> None:
        try:
            outcomes.append(len(parse_header(text.encode()).entries))
        except HeaderError:
            outcomes.append(-1)

    outcomes: list[int] = []
    count()
    assert {-1, 0, 1, 2} <= set(outcomes)
    assert 100 < outcomes.count(-1) < 900


# --- order and byte ranges -------------------------------------------------------------------------------


def test_tensors_are_in_the_order_of_their_bytes() -> None:
    text = (
        '{"b":{"shape":[2],"data_offsets":[4,8],"dtype":"BF16"},'
        '"__metadata__":{"format":"pt"},'
        '"none":{"dtype":"F64","shape":[0,5],"data_offsets":[4,4]},'
        '"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}   '
    )
    header = parse_header(text.encode())
    assert header.entries == (
        TensorEntry("a", torch.float32, (), 0, 4),
        TensorEntry("none", torch.float64, (0, 5), 4, 4),
        TensorEntry("b", torch.bfloat16, (2,), 4, 8),
    )
    assert [entry.num_bytes for entry in header.entries] == [4, 0, 4]
    assert (header.metadata, header.num_bytes) == ({"format": "pt"}, 8)
    check_library(header, text.encode())


@pytest.mark.parametrize(
    ("offsets", "name", "needed"),
    [
        ([(4, 8), (8, 12)], "t0", [0, 4]),
        ([(0, 4), (8, 12)], "t1", [4, 8]),
        ([(0, 4), (0, 4)], "t1", [4, 8]),
        ([(2, 6), (0, 4)], "t0", [4, 8]),
        ([(0, 4), (4, 9)], "t1", [4, 8]),
        ([(0, 4), (8, 4)], "t1", [4, 8]),
    ],
)
def test_gaps_overlaps_and_wrong_sizes(offsets: list[tuple[int, int]], name: str, needed: list[int]) -> None:
    members = {
        f"t{number}": {"dtype": "F32", "shape": [1], "data_offsets": pair}
        for number, pair in enumerate(offsets)
    }
    error = refused(json.dumps(members))
    given_offsets = list(offsets[int(name[1])])
    message = f"data_offsets are {given_offsets}; shape, dtype and the tensors before it need {needed}"
    assert (str(error), error.tensor) == (f"tensor {name!r}: {message}", name)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "F8_E4M3"}, "dtype: must be 'F64', 'F32', 'BF16', 'F16', 'I64'"),
        ({"dtype": "f32"}, "dtype: must be 'F64'"),
        ({"dtype": None}, "dtype: must be 'F64'"),
        ({"dtype": ["F32"]}, "dtype: must be 'F64'"),
        ({"shape": None}, "shape: must be a list"),
        ({"shape": [-2, -3]}, "shape.0: must be an integer"),
        ({"shape": [2.0, 3]}, "shape.0: must be an integer"),
        ({"shape": [True, 6]}, "shape.0: must be an integer"),
        ({"shape": ["2", 3]}, "shape.0: must be an integer"),
        ({"shape": {"2": 3}}, "shape: must be a list"),
        ({"shape": [10**18, 0]}, "shape.0: must be an integer"),
        ({"shape": [2]}, "data_offsets are [0, 24]; shape, dtype and the tensors before it need [0, 8]"),
        ({"shape": [6, 2**40, 2**40]}, "a shape that no memory can hold"),
        # The product overflows on its way to 0.
        ({"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}, "a shape that no memory can hold"),
        ({"shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}, "a shape that no memory can hold"),
        ({"shape": [6] + [1] * 64}, "shape: must have at most 64 items"),
        ({"data_offsets": [0]}, "data_offsets: must have at least 2 items"),
        ({"data_offsets": [0, 24, 24]}, "data_offsets: must have at most 2 items"),
        ({"data_offsets": [-24, 0]}, "data_offsets.0: must be an integer"),
        ({"data_offsets": "0,24"}, "data_offsets: must be a list"),
        ({"more": 1}, "more: unknown field"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    error = refused(one(**changes))
    assert str(error).startswith(f"tensor 'w': {message}")
    assert error.tensor == "w"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        *((value, "fields: must be") for value in ("1", "[]", "null", '"F32"')),
        ("{}", "dtype: it is missing"),
        ('{"dtype": "F32", "shape": []}', "data_offsets: it is missing"),
    ],
)
def test_missing_fields(value: str, message: str) -> None:
    error = refused(f'{{"w": {value}}}')
    assert str(error).startswith(f"tensor 'w': {message}")
    assert error.tensor == "w"


@pytest.mark.parametrize("value", ["null", "[]", '"a"', '{"a": 1}', '{"a": null}', '{"a": {"b": "c"}}'])
def test_metadata_are_strings(value: str) -> None:
    error = refused(f'{{"__metadata__": {value}}}')
    assert (str(error), error.tensor) == ("__metadata__ must be an object of strings", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must begin with {"),
        (b" {}", "must begin with {"),
        (b"[]", "must begin with {"),
        (b"\xef\xbb\xbf{}", "must begin with {"),
        ("{}".encode("utf-16"), "must begin with {"),
        (b"{", "not JSON: "),
        (b"{}{}", "not JSON: Extra data"),
        (b"{}\0", "not JSON: Extra data"),
        (b"{'w': 1}", "not JSON: "),
        (b'{"w": NaN}', "not JSON: NaN is not a JSON number"),
        (b'{"w": -Infinity}', "not JSON: -Infinity is not"),
        (b'{"\xff": 1}', "not JSON: not UTF-8"),
        (b'{"\xed\xa0\x80": 1}', "not JSON: not UTF-8"),
        (b'{"\\ud800": 1}', "not JSON: not UTF-8"),
        (b'{"__metadata__": {"a": "\\udc00"}}', "not JSON: not UTF-8"),
        (b'{"a\nb": 1}', "not JSON: Invalid control character"),
        (b'{"w": 1, "v": 2, "\\u0077": 1}', "not JSON: duplicate key 'w'"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "not JSON: duplicate key '__metadata__'"),
        (b'{"w": {"dtype": "F32", "dtype": "F32"}}', "not JSON: duplicate key 'dtype'"),
        (b'{"__metadata__": {"a": "b", "a": "b"}}', "not JSON: duplicate key 'a'"),
        (b'{"w": ' + b"[" * 10**6, "not JSON: "),
        (b'{"w": ' * 10**5, "not JSON: "),
        (b'{"' + b"w" * 1025 + b'": 1}', "a tensor's name has more than 1024 characters"),
    ],
)
def test_malformed_headers(text: bytes, message: str) -> None:
    error = refused(text)
    assert message in str(error)
    assert error.tensor is None
    assert len(str(error)) < 300


@pytest.mark.parametrize("number", ["-0", "0.0", "0e0", "9" * 19, "9" * 4300, "9" * 10**6])
def test_numbers_that_python_would_take(number: str) -> None:
    # -0 is 0 for Python alone. It refuses to convert more than 4,300 digits, and takes long for those below.
    error = refused(f'{{"w": {{"dtype": "F32", "shape": [{number}], "data_offsets": [0, 0]}}}}')
    assert str(error).startswith("tensor 'w': shape.0: must be an integer")


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"\x08",
        b"\x02" + bytes(6),
        bytes(8),
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little"),
        b"version ",
        b"\xff" * 8,
    ],
)
def test_absurd_lengths(first: bytes) -> None:
    with pytest.raises(HeaderError, match="no safetensors header: ") as caught:
        header_length(first)
    assert caught.value.tensor is None


@pytest.mark.parametrize("length", [1, 2, 0x0102, MAX_HEADER_BYTES])
def test_lengths(length: int) -> None:
    assert header_length(length.to_bytes(8, "little")) == length


# --- size -------------------------------------------------------------------------------------------


def test_many_tensors(tmp_path: Path) -> None:
    rng = random.Random(0)
    tensors = [
        (f"model.layers.{number}.weight", rng.choice(list(DTYPES)), [rng.randint(0, 3), 2])
        for number in range(50_000)
    ]
    text = text_of(tensors).encode()
    header = parse_header(text)
    assert len(header.entries) == 50_000
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(text, header.num_bytes))
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == {entry.name for entry in header.entries}


def test_one_duplicate_of_many_keys() -> None:
    # Found in one pass: a search for each key would take minutes.
    keys = ",".join(f'"{number}":0' for number in range(200_000))
    assert "duplicate key '7'" in str(refused(f'{{{keys},"7":0}}'))
