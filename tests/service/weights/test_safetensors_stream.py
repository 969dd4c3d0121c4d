"""Safetensors files that arrive in blocks: cut anywhere, they give the same; invalid ones are refused."""

import asyncio
import itertools
import json
import math
import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shopr1_client.errors import InvalidWeightsError, TooLargeError
from shopr1_service.weights import safetensors_stream
from shopr1_service.weights.safetensors_header import Header
from shopr1_service.weights.safetensors_stream import SafetensorsStream, feed_in_threads
from tests.support.http import problem
from tests.support.models import one_thread, tiny_model
from tests.support.updating import (
    HEAD,
    NORM,
    PART,
    Service,
    Unchanged,
    changed_model,
    done,
    file_of,
    flaws,
    numbers_of,
    updatable,
    weights_of,
)

pytestmark = pytest.mark.anyio

SMALL = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.zeros(0),
    "c": torch.tensor(1.5, dtype=torch.float64),
    "d": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
}
FILE = file_of(SMALL, note="x")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Recorder:
    """Callbacks of a stream, which record their arguments."""

    def __init__(self, max_bytes: int = 10**9) -> None:
        self.header: Header | None = None
        self.content = b""
        self.max_bytes = max_bytes

    def stream(self) -> SafetensorsStream:
        return SafetensorsStream(self.on_header, self.on_data)

    def on_header(self, header: Header) -> None:
        assert self.header is None
        self.header = header
        if header.num_bytes > self.max_bytes:
            raise TooLargeError(f"{header.num_bytes} bytes")

    def on_data(self, block: memoryview) -> None:
        assert self.header is not None
        self.content += block


async def stream(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def pieces_of(content: bytes, cuts: Sequence[int]) -> list[bytes]:
    ends = [0, *sorted(cuts), len(content)]
    return [content[start:end] for start, end in itertools.pairwise(ends)]


def _header_and(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


# --- cuts -------------------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(0, len(FILE)), max_size=12))
def test_a_file_may_be_cut_anywhere(cuts: list[int]) -> None:
    recorder = Recorder()
    parser = recorder.stream()
    for piece in pieces_of(FILE, cuts):
        parser.feed(memoryview(piece))
    header = parser.finish()
    assert header is recorder.header
    assert header.metadata == {"note": "x"}
    assert recorder.content == FILE[8 + struct.unpack("<Q", FILE[:8])[0] :]
    assert {entry.name: (entry.dtype, entry.shape) for entry in header.entries} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in SMALL.items()
    }


@given(end=st.integers(0, len(FILE) - 1))
def test_a_truncated_file_is_refused(end: int) -> None:
    parser = Recorder().stream()
    parser.feed(memoryview(FILE[:end]))
    num_data = len(FILE) - 8 - struct.unpack("<Q", FILE[:8])[0]
    in_data = end >= len(FILE) - num_data
    expected = f"{len(FILE) - end} bytes too early" if in_data else f"after {end} bytes, in its header"
    with pytest.raises(InvalidWeightsError, match=expected):
        parser.finish()


def test_a_file_that_is_too_long() -> None:
    parser = Recorder().stream()
    with pytest.raises(InvalidWeightsError, match="2 bytes more than the header announces"):
        parser.feed(memoryview(FILE + b"xy"))


def test_a_header_can_be_refused_before_its_data() -> None:
    num_bytes = sum(tensor.nbytes for tensor in SMALL.values())
    Recorder(num_bytes).stream().feed(memoryview(FILE))
    recorder = Recorder(num_bytes - 1)
    with pytest.raises(TooLargeError, match=f"{num_bytes} bytes"):
        recorder.stream().feed(memoryview(FILE))
    assert recorder.content == b""


# --- threads ----------------------------------------------------------------------------------------


async def test_pieces_are_gathered_into_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_stream, "_PIECE_BYTES", 10)
    fed: list[bytes] = []
    await feed_in_threads(stream(bytes([i]) * 4 for i in range(7)), lambda block: fed.append(bytes(block)))
    assert b"".join(fed) == b"".join(bytes([i]) * 4 for i in range(7))
    assert [len(block) for block in fed if block] == [12, 12, 4]


async def test_an_error_of_the_consumer_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_stream, "_PIECE_BYTES", 1)
    num_sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_sent
        while True:
            num_sent += 1
            yield b"x"

    def refuse(block: memoryview) -> None:
        if block:
            raise InvalidWeightsError("no")

    with pytest.raises(InvalidWeightsError, match="no"):
        await feed_in_threads(endless(), refuse)
    assert num_sent <= 3


async def test_a_stream_that_fails_waits_for_the_piece_in_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_stream, "_PIECE_BYTES", 1)
    loop, begun, events = asyncio.get_running_loop(), asyncio.Event(), list[str]()

    async def breaking() -> AsyncIterator[bytes]:
        yield b"x"
        await begun.wait()
        events.append("broken")
        raise ConnectionError

    def take(block: memoryview) -> None:
        if block:
            loop.call_soon_threadsafe(begun.set)
            while not events:  # still at it when the stream breaks
                pass
            events.append("taken")

    with pytest.raises(ConnectionError):
        await feed_in_threads(breaking(), take)
    assert events == ["broken", "taken"]


# --- through the route ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_partial", [False, True])
async def test_an_upload_gives_the_numbers_of_a_fresh_service(is_partial: bool) -> None:
    model = changed_model(prefix=PART if is_partial else "")
    content = file_of(weights_of(model, PART if is_partial else ""))
    num_head = 8 + struct.unpack("<Q", content[:8])[0]
    one_by_one = [content[i : i + 1] for i in range(num_head)]
    async with updatable() as service:
        before = await service.numbers()
        update = done(await service.upload(stream([*one_by_one, content[num_head:]]), partial=is_partial))
        after = await service.numbers()
    assert before == await numbers_of(tiny_model())
    assert after == await numbers_of(model)
    assert after != before
    assert update["num_bytes"] == len(content) - num_head
    assert update["num_tensors"] == len(weights_of(model, PART if is_partial else ""))


def _ending_in(name: str, value: float) -> bytes:
    weights = weights_of(changed_model())
    weights[name].view(-1)[-1] = value
    return file_of(weights)


def _without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in weights_of(changed_model()).items() if key != name}


NEW = file_of(changed_model())
LENGTH = struct.unpack("<Q", NEW[:8])[0]
LYING = json.loads(NEW[8 : 8 + LENGTH])
LYING[NORM]["shape"] = [33]
ONE = b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
INT = {**_without(NORM), NORM: torch.zeros(32, dtype=torch.int32)}
RESHAPED = {**_without(NORM), NORM: torch.zeros(4, 8)}
UP = f"{PART}mlp.up_proj.weight"

REFUSED: dict[str, tuple[bytes, dict[str, str]]] = {
    "unknown and missing": (
        file_of({**_without(NORM), "x": torch.zeros(2)}),
        {"x": "the policy has no such tensor", NORM: "it is missing"},
    ),
    "missing": (file_of(_without(UP)), {UP: "it is missing"}),
    "shape": (file_of(RESHAPED), {NORM: "its shape is [4, 8], the policy's [32]"}),
    "NaN": (_ending_in(NORM, math.nan), {NORM: "NaN or infinite values"}),
    "infinite": (_ending_in(HEAD, -math.inf), {HEAD: "NaN or infinite values"}),
    "integers": (file_of(INT), {NORM: "it is torch.int32, and the policy's has fractions"}),
    "truncated": (NEW[:-1], {}),
    "truncated header": (NEW[: LENGTH - 5], {}),
    "nothing": (b"", {}),
    "too long": (NEW + b"\0", {}),
    "huge header": (struct.pack("<Q", 2**63) + NEW[8:], {}),
    "short header": (struct.pack("<Q", LENGTH - 8) + NEW[8:], {}),
    "no JSON": (_header_and(b"{no JSON"), {}),
    "twice": (_header_and(b"{" + ONE + b"," + ONE + b"}"), {}),
    "a pickle": (b"PK\3\4" + NEW, {}),
    "lying": (
        _header_and(json.dumps(LYING).encode(), NEW[8 + LENGTH :]),
        {NORM: "shape, dtype and the tensors before it need"},
    ),
}


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with updatable() as service:
        yield service


@pytest.mark.parametrize("flaw", REFUSED)
async def test_a_refused_file_changes_nothing(service: Service, flaw: str) -> None:
    content, expected = REFUSED[flaw]
    async with Unchanged(service):
        found = flaws(await service.upload(content))
    assert found.keys() == expected.keys()
    for location, message in expected.items():
        assert message in found[location]
    # The next upload succeeds.
    done(await service.upload(NEW))


async def test_all_that_is_missing_is_named(service: Service) -> None:
    only = {NORM: torch.ones(32)}
    refused = await service.upload(file_of(only))
    assert flaws(refused) == dict.fromkeys(weights_of(tiny_model()).keys() - {NORM}, "it is missing")
    assert "; and " in problem(refused, 422, "invalid_weights")["detail"]
    done(await service.upload(file_of(only), partial=True))


async def test_a_partial_update_needs_a_tensor(service: Service) -> None:
    async with Unchanged(service):
        refused = await service.upload(file_of({}), partial=True)
    assert problem(refused, 422, "invalid_weights")["detail"] == "there are no tensors"


@pytest.mark.parametrize(
    ("params", "location"),
    [
        ({}, "query.version"),
        ({"version": ""}, "query.version"),
        ({"version": "x" * 257}, "query.version"),
        ({"version": "1", "partial": "maybe"}, "query.partial"),
    ],
)
async def test_malformed_parameters(service: Service, params: dict[str, str], location: str) -> None:
    async with Unchanged(service):
        refused = await service.http.put("/policy/weights", params=params, content=NEW)
    assert flaws(refused, 422, "invalid_request").keys() == {location}


async def test_a_body_may_be_larger_than_any_other() -> None:
    async with updatable(max_body_bytes=1000) as service:
        done(await service.upload(NEW))
        refused = await service.http.post("/policy/update", content=b" " * 1001)
        problem(refused, 413, "too_large")
