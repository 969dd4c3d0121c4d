"""Clients that do not read: their answers would stay in memory, and hold the end of the service."""

import asyncio


class StallWatch:
    """Aborts a connection when its client takes nothing for a time.

    Args:
        limit_s: the time.
    """

    def __init__(self, transport: asyncio.Transport, limit_s: float) -> None:
        self._transport = transport
        self._limit_s = limit_s
        self._num_unsent = 0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Watch: something is not sent, or the connection is closing."""
        self.end()
        self._num_unsent = self._transport.get_write_buffer_size()
        self._timer = asyncio.get_running_loop().call_later(self._limit_s, self._check)

    def end(self) -> None:
        """Stop: everything is sent, or the connection is closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def tighten(self, limit_s: float) -> None:
        """Shorten the time, also one that has begun."""
        self._limit_s = min(self._limit_s, limit_s)
        if self._timer is not None:
            self.begin()

    def _check(self) -> None:
        if self._transport.get_write_buffer_size() < self._num_unsent:
            self.begin()
        else:
            self._transport.abort()
