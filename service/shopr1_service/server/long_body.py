"""Bodies of uploads, received past h11.

uvicorn and h11 take a body in chunks of 256 KiB at most, copy each of them four times, and stop reading in
between. For uploads of weights that costs several times what the network does.
"""

import asyncio
import weakref

import h11
import numpy as np
from starlette.types import Message
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

BUFFER_BYTES = 4 * 2**20
"""Bytes that are handed over at a time. Bodies that are shorter are left to h11."""
_FLUSH_S = 0.1
"""Seconds after which a buffer that is not full is handed over."""


def num_bytes_left(connection: h11.Connection) -> int:
    """Bytes of the current body that are still to come; 0 if it announces no length.

    h11 has no public name for it. If a release stores it elsewhere, h11 simply receives every body.
    """
    return getattr(connection._reader, "_remaining", 0)


class LongBody(asyncio.BufferedProtocol):
    """Replaces uvicorn's protocol of a connection from the first `receive` to the end of the body.

    Until the application reads, nothing is allocated: a stranger can announce any length, and is refused
    without a look at the body. h11 has read the beginning; in the end its count of missing bytes is set to 0.

    Its references to the connection are weak. With strong ones, a connection would stay in memory until the
    garbage collector finds it.
    """

    def __init__(self, protocol: H11Protocol) -> None:
        self._weak_protocol = weakref.ref(protocol)
        self._weak_cycle = weakref.ref(protocol.cycle)
        self._is_awaited, self._is_past_h11 = True, False
        self._num_left = self._num_filled = 0
        self._buffer = self._ready = memoryview(b"")
        self._flush: asyncio.TimerHandle | None = None
        protocol.cycle.receive = self.receive  # type: ignore[method-assign, assignment]  # uvicorn's own types

    async def receive(self) -> Message:
        """ASGI's `receive` for this request."""
        if self._is_awaited:
            self._begin()
        message: Message = await RequestResponseCycle.receive(self._cycle)  # type: ignore[assignment]
        if message["type"] == "http.request" and self._is_past_h11:
            message["body"], self._ready = self._ready, memoryview(b"")
        return message

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._buffer[self._num_filled :][: self._num_left]

    def buffer_updated(self, nbytes: int) -> None:
        self._num_left -= nbytes
        self._add(nbytes)
        if not self._num_left:
            self._give_back()

    def eof_received(self) -> None:
        self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_flush()
        self._buffer = self._ready = memoryview(b"")
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    @property
    def _protocol(self) -> H11Protocol:
        protocol = self._weak_protocol()
        assert protocol is not None  # the server holds it while the connection is open
        return protocol

    @property
    def _cycle(self) -> RequestResponseCycle:
        cycle = self._weak_cycle()
        assert cycle is not None  # its protocol holds it until the next request, which comes after the body
        return cycle

    def _begin(self) -> None:
        self._is_awaited = False
        protocol, cycle = self._protocol, self._cycle
        self._num_left = num_bytes_left(protocol.conn)
        if not self._num_left or protocol.transport.is_closing() or cycle.response_complete:
            return
        self._is_past_h11 = True
        # The part that h11 has read is put in front: so every buffer ends on a whole number of tensor
        # elements.
        begun, cycle.body = cycle.body, bytearray()
        self._renew_buffer(max(BUFFER_BYTES, len(begun)))
        self._buffer[: len(begun)] = begun
        cycle.message_event.clear()
        protocol.flow.resume_reading()
        protocol.transport.set_protocol(self)
        if begun:
            self._add(len(begun))

    def _add(self, num_bytes: int) -> None:
        self._num_filled += num_bytes
        if self._num_filled == len(self._buffer) or not self._num_left:
            self._hand_over()
        elif self._flush is None:
            self._flush = self._protocol.loop.call_later(_FLUSH_S, self._hand_over)

    def _hand_over(self) -> None:
        """Let `receive` return the buffer; read nothing until it has."""
        self._stop_flush()
        if self._cycle.response_complete:  # the body has been refused, and its rest is dropped
            self._num_filled = 0
            return
        self._ready = self._buffer[: self._num_filled]
        self._renew_buffer(BUFFER_BYTES if self._num_left else 0)
        self._cycle.message_event.set()
        self._protocol.flow.pause_reading()

    def _give_back(self) -> None:
        protocol = self._protocol
        protocol.conn._reader._remaining = 0  # type: ignore[union-attr]
        protocol.transport.set_protocol(protocol)
        self._buffer = memoryview(b"")
        protocol.handle_events()

    def _renew_buffer(self, num_bytes: int) -> None:
        # Not a bytearray: that would be filled with zeros.
        self._buffer = np.empty(num_bytes, np.uint8).data
        self._num_filled = 0

    def _stop_flush(self) -> None:
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
