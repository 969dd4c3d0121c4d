"""A safetensors file that arrives in blocks: its header is checked first, then its data are passed on.

Memory: the header and two pieces, one that is being processed on a thread and one that is being received.
"""

import asyncio
from collections.abc import AsyncIterable, Callable
from typing import TypeVar

from shopr1_client.errors import InvalidWeightsError
from shopr1_service.field_errors import field_problem
from shopr1_service.weights.safetensors_header import (
    LENGTH_BYTES,
    Header,
    HeaderError,
    header_length,
    parse_header,
)

_PIECE_BYTES = 4 * 2**20

_Result = TypeVar("_Result")


class SafetensorsStream:
    """Incremental parser of one file.

    Args:
        on_header: called once, before any data; may refuse the file.
        on_data: gets the tensors' bytes in order, cut anywhere.

    Raises (every method):
        InvalidWeightsError: not a safetensors file, too short or too long.
        ProblemError: raised by `on_header` or `on_data`.
    """

    def __init__(self, on_header: Callable[[Header], None], on_data: Callable[[memoryview], None]) -> None:
        self._on_header = on_header
        self._on_data = on_data
        self._head = bytearray()
        self._header: Header | None = None
        self._num_missing = 0

    def feed(self, block: memoryview) -> None:
        """Process the next bytes of the file, cut anywhere."""
        if self._header is None:
            block = self._take_head(block)
        if self._header is None or not block:
            return
        self._num_missing -= len(block)
        if self._num_missing < 0:
            raise InvalidWeightsError(f"{-self._num_missing} bytes more than the header announces")
        self._on_data(block)

    def finish(self) -> Header:
        """Check that the file is complete; returns its header."""
        if self._header is None:
            raise InvalidWeightsError(f"the file ends after {len(self._head)} bytes, in its header")
        if self._num_missing:
            raise InvalidWeightsError(f"the file ends {self._num_missing} bytes too early")
        return self._header

    def _take_head(self, block: memoryview) -> memoryview:
        """Collect the header; returns the bytes after it."""
        block = self._collect(block, LENGTH_BYTES)
        if len(self._head) < LENGTH_BYTES:
            return block
        num_bytes = LENGTH_BYTES + _checked(header_length, bytes(self._head[:LENGTH_BYTES]))
        block = self._collect(block, num_bytes)
        if len(self._head) == num_bytes:
            header = _checked(parse_header, bytes(self._head[LENGTH_BYTES:]))
            self._on_header(header)
            self._header, self._num_missing = header, header.num_bytes
        return block

    def _collect(self, block: memoryview, num_bytes: int) -> memoryview:
        """Fill the head up to this size; returns the rest of the block."""
        num_needed = max(0, num_bytes - len(self._head))
        self._head += block[:num_needed]
        return block[num_needed:]


async def feed_in_threads(stream: AsyncIterable[bytes], feed: Callable[[memoryview], None]) -> None:
    """Feed a whole stream in pieces, on threads; the next piece is received meanwhile."""
    piece = bytearray()
    feeding = asyncio.create_task(asyncio.to_thread(feed, memoryview(b"")))
    try:
        async for block in stream:
            if not piece and len(block) >= _PIECE_BYTES:
                whole = memoryview(block)  # without a copy
            else:
                piece += block
                if len(piece) < _PIECE_BYTES:
                    continue
                whole, piece = memoryview(piece), bytearray()
            await feeding
            feeding = asyncio.create_task(asyncio.to_thread(feed, whole))
        await feeding
        await asyncio.to_thread(feed, memoryview(piece))
    finally:
        # A thread cannot be stopped; the caller must not clean up while it runs.
        await asyncio.wait([feeding])


def _checked(read: Callable[[bytes], _Result], data: bytes) -> _Result:
    try:
        return read(data)
    except HeaderError as error:
        raise field_problem(InvalidWeightsError, error.tensor, str(error)) from error
