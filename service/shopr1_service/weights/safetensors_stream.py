"""A safetensors file that comes over HTTP, piece by piece, and goes on to whoever takes its tensors.

Nothing of it is held but the header and two pieces: one that is being taken, on a thread, and one that comes.
"""

import asyncio
from collections.abc import AsyncIterable, Callable, Sequence
from typing import Protocol, TypeVar

from shopr1_client.errors import InvalidWeightsError
from shopr1_service.field_errors import field_problem
from shopr1_service.weights.safetensors_header import (
    Header,
    HeaderError,
    TensorEntry,
    header_length,
    parse_header,
)

_PIECE_BYTES = 4 * 2**20
_LENGTH_BYTES = 8

_Result = TypeVar("_Result")


class Sink(Protocol):
    """Who takes tensors."""

    def announce(self, entries: Sequence[TensorEntry]) -> None:
        """What will come, in this order."""
        ...

    def feed(self, block: memoryview) -> None:
        """Bytes of it, wherever they are cut."""
        ...

    def end(self) -> None:
        """Nothing more comes."""
        ...


class Upload:
    """The header, then what it announces.

    Raises (every method):
        InvalidWeightsError: it is no safetensors file, or ends too early.
        ProblemError: what the sink raises.
    """

    def __init__(self, sink: Sink) -> None:
        self.header: Header | None = None
        self._sink = sink
        self._head = bytearray()

    def feed(self, block: memoryview) -> None:
        """Bytes of the file, wherever they are cut."""
        if self.header is None:
            block = self._take_head(block)
        if self.header is not None and block:
            self._sink.feed(block)

    def end(self) -> Header:
        """Nothing more comes; returns what stood in the header."""
        if self.header is None:
            raise InvalidWeightsError(f"the file ends after {len(self._head)} bytes, in its header")
        self._sink.end()
        return self.header

    def _take_head(self, block: memoryview) -> memoryview:
        """Collect the header; returns what comes behind it."""
        block = self._collect(block, _LENGTH_BYTES)
        if len(self._head) < _LENGTH_BYTES:
            return block
        num_bytes = _LENGTH_BYTES + _checked(header_length, bytes(self._head[:_LENGTH_BYTES]))
        block = self._collect(block, num_bytes)
        if len(self._head) < num_bytes:
            return block
        self.header = _checked(parse_header, bytes(self._head[_LENGTH_BYTES:]))
        self._sink.announce(self.header.entries)
        return block

    def _collect(self, block: memoryview, num_bytes: int) -> memoryview:
        """Until there are so many; returns what is left over."""
        num_missing = max(0, num_bytes - len(self._head))
        self._head += block[:num_missing]
        return block[num_missing:]


async def pour(stream: AsyncIterable[bytes], feed: Callable[[memoryview], None]) -> None:
    """Feed all of a stream, on threads; while a piece is being taken, the next one comes."""
    piece = bytearray()
    taking = asyncio.create_task(asyncio.to_thread(feed, memoryview(b"")))
    try:
        async for block in stream:
            if not piece and len(block) >= _PIECE_BYTES:
                whole = memoryview(block)  # without a copy
            else:
                piece += block
                if len(piece) < _PIECE_BYTES:
                    continue
                whole, piece = memoryview(piece), bytearray()
            await taking
            taking = asyncio.create_task(asyncio.to_thread(feed, whole))
        await taking
        await asyncio.to_thread(feed, memoryview(piece))
    finally:
        # A thread cannot be stopped; whoever cleans up must not do so under its feet.
        await asyncio.wait([taking])


def _checked(read: Callable[[bytes], _Result], given: bytes) -> _Result:
    try:
        return read(given)
    except HeaderError as error:
        raise field_problem(InvalidWeightsError, error.tensor, str(error)) from error
