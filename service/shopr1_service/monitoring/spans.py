"""Time spans of a request, for its trace.

The scoring core records when a step began and ended. The trace that receives it is in the request's context:
a contextvar, which tasks and prepare threads inherit. Without tracing there is none, and OpenTelemetry is not
imported.
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
class EnginePass:
    """Groups that the engine computes together, with their times; `end_s` is None until it has finished."""

    num_groups: int
    num_tokens: int
    start_s: float = field(default_factory=time.perf_counter)
    end_s: float | None = None

    def end(self) -> float:
        """Record the end, and return the duration in seconds."""
        self.end_s = time.perf_counter()
        return self.end_s - self.start_s


@contextmanager
def span(name: str) -> Iterator[None]:
    """Record the duration of the block."""
    start_s = time.perf_counter()
    try:
        yield
    finally:
        if (trace := current_trace.get()) is not None:
            trace.add(name, start_s, time.perf_counter())


def record_passes(passes: Iterable[EnginePass | None], submitted_s: float) -> None:
    """Record how long a request waited for the engine, and the passes that it was part of.

    Args:
        passes: one for each of its groups; None for a group that was dropped from the queue.
    """
    trace = current_trace.get()
    if trace is None:
        return
    for each in dict.fromkeys(passes):
        if each is None:
            trace.add("queue", submitted_s, time.perf_counter())
            continue
        end_s = time.perf_counter() if each.end_s is None else each.end_s
        trace.add("queue", submitted_s, each.start_s)
        trace.add("engine", each.start_s, end_s, num_groups=each.num_groups, num_tokens=each.num_tokens)
