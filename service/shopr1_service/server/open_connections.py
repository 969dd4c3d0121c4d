"""Room for connections when file descriptors run short: idle ones are closed, and health is answered.

The system gives a new connection the lowest free descriptor. One from the reserve, the highest numbers, shows
that all others are in use, for connections or files.
"""

import asyncio
import logging
import time
from typing import Protocol

logger = logging.getLogger(__name__)

_MAX_RESERVE = 256
_RESERVED_PART = 8
"""The reserve is an eighth of all descriptors, at most `_MAX_RESERVE`. New weights need some, too."""
_MIN_IDLE_S = 1.0
"""A client that has just connected sends its request within this time."""
_LOG_EVERY_S = 1.0


class IdleConnection(Protocol):
    """A connection without a request in progress."""

    transport: asyncio.Transport
    is_reserve: bool


class OpenConnections:
    """The connections of a server, as far as they can be closed.

    Args:
        max_files: file descriptors that this process may have open.
    """

    def __init__(self, max_files: int) -> None:
        self._max_files = max_files
        self._first_reserved = max_files - min(_MAX_RESERVE, max_files // _RESERVED_PART)
        self._idle_since_s: dict[IdleConnection, float] = {}  # the longest idle first
        self._next_log_s = 0.0
        self._num_closed = 0

    def is_from_reserve(self, connection: IdleConnection) -> bool:
        """Whether a new connection may only ask for the service's health.

        Another connection that is idle is closed for one whose descriptor is from the reserve. Their clients
        connect again.
        """
        if connection.transport.get_extra_info("socket").fileno() < self._first_reserved:
            return False
        closed = self.close_idle(f"the limit of open files is {self._max_files}, and few are left")
        return closed is None or closed.is_reserve

    def set_idle(self, connection: IdleConnection) -> None:
        self.set_busy(connection)
        self._idle_since_s[connection] = time.monotonic()

    def set_busy(self, connection: IdleConnection) -> None:
        """Also when it is closed."""
        self._idle_since_s.pop(connection, None)

    def close_idle(self, reason: str) -> IdleConnection | None:
        """Close the connection that has been idle longest; None: all are busy or new.

        Args:
            reason: for the log, which gets one line a second at most.
        """
        self._log(reason)
        latest_s = time.monotonic() - _MIN_IDLE_S
        for connection, since_s in self._idle_since_s.items():
            if since_s > latest_s:
                return None
            if (
                not connection.transport.get_write_buffer_size()
            ):  # else closing it takes as long as its client
                del self._idle_since_s[connection]
                connection.transport.close()
                self._num_closed += 1
                return connection
        return None

    def _log(self, reason: str) -> None:
        if time.monotonic() < self._next_log_s:
            return
        self._next_log_s = time.monotonic() + _LOG_EVERY_S
        logger.warning(
            "no room for more connections: %s; idle ones closed so far: %d", reason, self._num_closed
        )
