"""uvicorn's HTTP/1.1 connection with timeouts, bounded memory, and an order in which connections are closed.

uvicorn closes connections that are idle after a response, but waits without limit for the first request, for
the rest of a head that arrives byte by byte, for the rest of a body that was refused, and for a client that
does not read its answer. A handful of such clients would hold all connections.
"""

import asyncio
import resource
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from shopr1_service.http.middleware.availability import IS_RESERVE
from shopr1_service.http.middleware.body_limits import EXTEND_TIMEOUT
from shopr1_service.server import long_body
from shopr1_service.server.open_connections import OpenConnections
from shopr1_service.server.unsent_answers import StallWatch

_LINGER_S = 5.0
"""How much longer than the application the connection waits for a body: the client should read its 408."""
_ENDING_STALL_S = 2.0
"""While the service ends, a client that takes nothing of its answer for this time loses the rest."""


class _Parser(h11.Connection):
    """h11's connection; its errors do not keep their connections."""

    def next_event(self) -> Any:  # noqa: ANN401  # as h11's
        try:
            return super().next_event()
        except h11.RemoteProtocolError as error:
            # A frame of h11's and the error hold each other, until the garbage collector finds them.
            traceback.clear_frames(error.__traceback__)
            raise


class Connection(H11Protocol):
    """Connection that is closed when the client takes too long.

    Attributes:
        receive_timeout_s: for a head, for the body after it, and for a client that takes nothing of its
            answer.
        open_connections: those of its server.
        is_reserve: whether it may only ask for the service's health.
    """

    receive_timeout_s: float = 60.0
    open_connections: OpenConnections
    is_reserve = False

    _awaited: object = None  # h11's state of the client that the timer was set for
    _timer: asyncio.TimerHandle | None = None
    _stall: StallWatch

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401  # uvicorn's
        super().__init__(*args, **options)
        self.conn = _Parser(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._stall = StallWatch(transport, self.receive_timeout_s)
        # Also the last byte counts as not taken. (A limit of 0 stops every answer over TLS.)
        transport.set_write_buffer_limits(high=1, low=0)
        self.is_reserve = self.open_connections.is_from_reserve(self)
        self.open_connections.set_idle(self)
        self._update_timer()

    def handle_events(self) -> None:
        former = self.cycle
        super().handle_events()
        if self.cycle is not former:  # a head has arrived; its request has not started to run
            self._begin_request()
        self._update_timer()

    def on_response_complete(self) -> None:
        if self.transport.is_closing():
            self._stall.begin()  # also where all is sent: over TLS the client confirms the end
        else:
            self.open_connections.set_idle(self)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall.begin()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.end()

    def shutdown(self) -> None:
        super().shutdown()
        self._stall.tighten(_ENDING_STALL_S)
        if self.transport.is_closing():
            self._stall.begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        # After an error uvicorn keeps this timer, and with it the connection.
        self._unset_keepalive_if_required()
        self._stall.end()
        self.open_connections.set_busy(self)

    def _begin_request(self) -> None:
        self.open_connections.set_busy(self)
        scope = self.scope
        scope[EXTEND_TIMEOUT] = _weakly(self._restart_timer)  # type: ignore[literal-required]  # of our own
        scope[IS_RESERVE] = self.is_reserve  # type: ignore[literal-required]
        if self.is_reserve:
            self.cycle.keep_alive = False
        if long_body.num_bytes_left(self.conn) >= long_body.BUFFER_BYTES:
            long_body.LongBody(self)

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


def connection_class(receive_timeout_s: float, max_files: int | None = None) -> type[Connection]:
    """The class for `uvicorn.Config(http=…)`; uvicorn makes the objects.

    Args:
        max_files: file descriptors that this process may have open; None: the limit that the system has set.
    """
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_connections = OpenConnections(soft_limit if max_files is None else max_files)
    members = {"receive_timeout_s": receive_timeout_s, "open_connections": open_connections}
    return type("Connection", (Connection,), members)


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """The method, without holding its object: a request's scope is part of its connection."""
    weak = weakref.WeakMethod(method)

    def call() -> None:
        if (found := weak()) is not None:
            found()

    return call
