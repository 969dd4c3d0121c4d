"""uvicorn's HTTP/1.1 connection, with a limit on the time that a request may take to arrive.

uvicorn closes connections that are idle after an answer, but waits for ever for the first request, for the
rest of a head that comes drop by drop, and for the rest of a body that was refused: a handful of such clients
would hold all connections.

Long bodies of requests, received right into large buffers.

uvicorn and h11 take a body in pieces of 256 KiB at most, copy each of them four times, and stop reading in
between. For weights that costs several times what the network does.
"""

import asyncio
from collections.abc import Callable

import h11
import numpy as np
from starlette.types import Message
from uvicorn.protocols.http.h11_impl import H11Protocol

from shopr1_service.http.middleware.body_limits import MORE_TIME
from shopr1_service.server import http_protocol as long_body

_LINGER_S = 5.0
"""How much longer than the application the connection waits for a body: whoever gets 408 should read it."""


class Connection(H11Protocol):
    """Closed when a head, or after it the body, does not come within `receive_timeout_s`."""

    receive_timeout_s: float = 60.0

    _awaited: object = None  # h11's state of the client that the timer stands for
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def handle_events(self) -> None:
        former = self.cycle
        super().handle_events()
        if self.cycle is not former:  # a head has come; what answers it has not begun
            self.scope[MORE_TIME] = self._more_time  # type: ignore[literal-required]  # of our own
            if num_bytes_left(self.conn) >= long_body.BUFFER_BYTES:
                LongBody(self, on_end=self._body_ended)

    def _body_ended(self) -> None:
        self.handle_events()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Keep the timer for what the client has to send next. More of the same does not set it back."""
        state = self.conn.their_state
        if state is self._awaited or self.transport.is_closing():
            return
        self._stop()
        self._awaited = state
        if state is h11.IDLE:
            self._timer = self.loop.call_later(self.receive_timeout_s, self.transport.close)
        elif state is h11.SEND_BODY:
            self._timer = self.loop.call_later(self.receive_timeout_s + _LINGER_S, self.transport.close)

    def _more_time(self) -> None:
        self._awaited = None
        self._watch()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def connection_class(receive_timeout_s: float) -> type[Connection]:
    """The class for `uvicorn.Config(http=…)`, which makes its objects itself."""
    return type("Connection", (Connection,), {"receive_timeout_s": receive_timeout_s})


BUFFER_BYTES = 4 * 2**20
"""What is handed on at a time. A body of which less is still to come is left to h11."""
_FLUSH_S = 0.1
"""How long what has come waits at most for more, before it is handed on."""


def num_bytes_left(connection: h11.Connection) -> int:
    """Of the body that is coming; 0 if nobody has announced how long it is.

    h11 has no public name for it. Should a release keep it elsewhere, h11 goes on taking all bodies.
    """
    return getattr(connection._reader, "_remaining", 0)


class LongBody(asyncio.BufferedProtocol):
    """Stands in for uvicorn's protocol of a connection from a request's head to the end of its body.

    h11 has seen the body's beginning, and in the end is told that it has seen all of it.

    Args:
        on_end: called when it has been told.
    """

    def __init__(self, protocol: H11Protocol, on_end: Callable[[], None]) -> None:
        self._protocol = protocol
        self._on_end = on_end
        self._cycle = protocol.cycle
        self._uvicorns_receive = protocol.cycle.receive
        self._num_left = num_bytes_left(protocol.conn)
        self._ready = memoryview(b"")
        self._flush: asyncio.TimerHandle | None = None
        # What h11 has seen goes first into the buffer: so all of them end where numbers end.
        begun, self._cycle.body = self._cycle.body, bytearray()
        self._renew_buffer(max(BUFFER_BYTES, len(begun)))
        self._buffer[: len(begun)] = begun
        self._take_over()
        if begun:
            self._filled(len(begun))

    async def receive(self) -> Message:
        """ASGI's `receive` for this request."""
        message: Message = await self._uvicorns_receive()  # type: ignore[assignment]  # uvicorn's own types
        if message["type"] == "http.request":
            message["body"], self._ready = self._ready, memoryview(b"")
        return message

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._buffer[self._num_filled :][: self._num_left]

    def buffer_updated(self, nbytes: int) -> None:
        self._num_left -= nbytes
        self._filled(nbytes)
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

    def _filled(self, num_bytes: int) -> None:
        self._num_filled += num_bytes
        if self._num_filled == len(self._buffer) or not self._num_left:
            self._hand_over()
        elif self._flush is None:
            self._flush = self._protocol.loop.call_later(_FLUSH_S, self._hand_over)

    def _hand_over(self) -> None:
        """What has come is the next that `receive` gives, and nothing is read until it has given it."""
        self._stop_flush()
        if self._cycle.response_complete:  # it has been refused, and nobody wants the rest
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
