"""Whether the engine is alive: it gives a sign while it waits, and at every batch and pass of the model.

A pass that does not come back, as on a device that hangs, is nothing that a thread can be freed from. The
process has to end, and its supervisor to start it anew.
"""

import time

IDLE_BEAT_S = 1.0
"""How often an engine that waits gives a sign."""


class Heartbeat:
    """Time since the last sign. Monotonic: a clock that is set does not make an engine look dead."""

    def __init__(self) -> None:
        self.beat()

    def beat(self, *_: object) -> None:
        """Give a sign. Takes anything, so that it can be a hook."""
        self._beat_s = time.monotonic()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._beat_s
