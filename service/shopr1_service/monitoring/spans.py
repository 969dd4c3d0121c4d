"""Where the time of a request goes, for whoever traces it.

The scoring core says when something began and ended; who listens is in the context of the request that is
worked on: a contextvar, which goes along into tasks and prepare threads. Without tracing nobody listens, and
nothing of OpenTelemetry is imported.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol


class Trace(Protocol):
    """The trace of one request. Times are on the clock of `time.perf_counter`."""

    def add(self, name: str, start_s: float, end_s: float, **attributes: int) -> None: ...


current_trace: ContextVar[Trace | None] = ContextVar("shopr1_trace", default=None)


@dataclass(eq=False)
class Visit:
    """What the engine measures together, from when until when; `end_s` is None while it does."""

    num_groups: int
    num_tokens: int
    start_s: float = field(default_factory=time.perf_counter)
    end_s: float | None = None

    def end(self) -> float:
        """How long it took, in seconds."""
        self.end_s = time.perf_counter()
        return self.end_s - self.start_s


@contextmanager
def span(name: str) -> Iterator[None]:
    """Record the time that the block takes."""
    start_s = time.perf_counter()
    try:
        yield
    finally:
        if (trace := current_trace.get()) is not None:
            trace.add(name, start_s, time.perf_counter())


def record_visits(visits: Iterable[Visit | None], submitted_s: float) -> None:
    """Record how long a call waited for the engine and what it was part of there.

    Args:
        visits: of each of its groups; None for one that was dropped before.
    """
    trace = current_trace.get()
    if trace is None:
        return
    for visit in dict.fromkeys(visits):
        if visit is None:
            trace.add("queue", submitted_s, time.perf_counter())
            continue
        end_s = time.perf_counter() if visit.end_s is None else visit.end_s
        trace.add("queue", submitted_s, visit.start_s)
        trace.add("engine", visit.start_s, end_s, num_groups=visit.num_groups, num_tokens=visit.num_tokens)
