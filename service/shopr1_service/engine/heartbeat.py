"""Heartbeat of the engine: it beats while the engine waits, at every batch, and at every pass of the model.

A thread cannot be freed from a pass that never returns, as on a device that hangs. The process must end,
and its supervisor must restart it.
"""

import time

IDLE_BEAT_S = 1.0
"""Seconds between two beats of an idle engine."""


class Heartbeat:
    """Time since the last beat. Monotonic: setting the clock does not make an engine look dead."""

    def __init__(self) -> None:
        self.beat()

    def beat(self, *_: object) -> None:
        """Record a beat. Ignores its arguments, so that it can be a forward hook."""
        self._beat_s = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._beat_s
