"""uvicorn's HTTP/1.1 connection, with a limit on the time that a request may take to arrive.

uvicorn closes connections that are idle after an answer, but waits for ever for the first request, for the
rest of a head that comes drop by drop, and for the rest of a body that was refused: a handful of such clients
would hold all connections.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from shopr1_service import long_body
from shopr1_service.long_body import LongBody, num_bytes_left

MORE_TIME = "shopr1.more_time"
"""In a request's scope: to be called by whoever lets a body take longer, each time that a piece has come."""
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
