"""uvicorn's HTTP/1.1 connection with timeouts, and large buffers for long bodies.

Timeouts: uvicorn closes connections that are idle after a response, but waits without limit for the first
request, for the rest of a head that arrives byte by byte, and for the rest of a body that was refused. A
handful of such clients would hold all connections.

Long bodies: uvicorn and h11 take a body in chunks of 256 KiB at most, copy each of them four times, and stop
reading in between. For uploads of weights that costs several times what the network does: `LongBody` receives
them past h11.
"""

import asyncio
from collections.abc import Callable

import h11
import numpy as np
from starlette.types import Message
from uvicorn.protocols.http.h11_impl import H11Protocol

from shopr1_service.http.middleware.body_limits import EXTEND_TIMEOUT

BUFFER_BYTES = 4 * 2**20
"""Bytes that are handed over at a time. The last part of a body that is shorter is left to h11."""
_FLUSH_S = 0.1
"""Seconds after which a buffer that is not full is handed over."""
_LINGER_S = 5.0
"""How much longer than the application the connection waits for a body: the client should read its 408."""


class Connection(H11Protocol):
    """Connection that is closed when a head, or after it the body, takes longer than `receive_timeout_s`."""

    receive_timeout_s: float = 60.0

    _awaited: object = None  # h11's state of the client that the timer was set for
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def handle_events(self) -> None:
        former = self.cycle
        super().handle_events()
        if self.cycle is not former:  # a head has arrived; its request has not started to run
            self.scope[EXTEND_TIMEOUT] = self._restart_timer  # type: ignore[literal-required]  # of our own
            if num_bytes_left(self.conn) >= BUFFER_BYTES:
                LongBody(self, on_end=self._body_ended)

    def _body_ended(self) -> None:
        self.handle_events()
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _update_timer(self) -> None:
        """Set the timer for what the client has to send next. More of the same does not restart it."""
        state = self.conn.their_state
        if state is self._awaited or self.transport.is_closing():
            return
        self._stop_timer()
        self._awaited = state
        if state is h11.IDLE:
            self._timer = self.loop.call_later(self.receive_timeout_s, self.transport.close)
        elif state is h11.SEND_BODY:
            self._timer = self.loop.call_later(self.receive_timeout_s + _LINGER_S, self.transport.close)

    def _restart_timer(self) -> None:
        self._awaited = None
        self._update_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def connection_class(receive_timeout_s: float) -> type[Connection]:
    """The class for `uvicorn.Config(http=…)`; uvicorn makes the objects."""
    return type("Connection", (Connection,), {"receive_timeout_s": receive_timeout_s})


def num_bytes_left(connection: h11.Connection) -> int:
    """Bytes of the current body that are still to come; 0 if it announces no length.

    h11 has no public name for it. If a release stores it elsewhere, h11 simply receives every body.
    """
    return getattr(connection._reader, "_remaining", 0)


class LongBody(asyncio.BufferedProtocol):
    """Replaces uvicorn's protocol of a connection from the head of a request to the end of its body.

    h11 has read the body's beginning; in the end its count of missing bytes is set to 0.

    Args:
        on_end: called then.
    """

    def __init__(self, protocol: H11Protocol, on_end: Callable[[], None]) -> None:
        self._protocol = protocol
        self._on_end = on_end
        self._cycle = protocol.cycle
        self._receive_of_uvicorn = protocol.cycle.receive
        self._num_left = num_bytes_left(protocol.conn)
        self._ready = memoryview(b"")
        self._flush: asyncio.TimerHandle | None = None
        # The part that h11 has read is put in front: so every buffer ends on a whole number of tensor
        # elements.
        begun, self._cycle.body = self._cycle.body, bytearray()
        self._renew_buffer(max(BUFFER_BYTES, len(begun)))
        self._buffer[: len(begun)] = begun
        self._take_over()
        if begun:
            self._add(len(begun))

    async def receive(self) -> Message:
        """ASGI's `receive` for this request."""
        message: Message = await self._receive_of_uvicorn()  # type: ignore[assignment]  # uvicorn's own types
        if message["type"] == "http.request":
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
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def _take_over(self) -> None:
        self._cycle.message_event.clear()
        self._cycle.receive = self.receive  # type: ignore[method-assign, assignment]
        self._protocol.flow.resume_reading()
        self._protocol.transport.set_protocol(self)

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
        self._renew_buffer(BUFFER_BYTES)
        self._cycle.message_event.set()
        self._protocol.flow.pause_reading()

    def _give_back(self) -> None:
        self._protocol.conn._reader._remaining = 0  # type: ignore[union-attr]
        self._protocol.transport.set_protocol(self._protocol)
        self._on_end()

    def _renew_buffer(self, num_bytes: int) -> None:
        # Not a bytearray: that would be filled with zeros.
        self._buffer = np.empty(num_bytes, np.uint8).data
        self._num_filled = 0

    def _stop_flush(self) -> None:
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
