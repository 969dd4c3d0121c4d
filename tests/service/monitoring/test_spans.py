"""Spans of a request: their times, and the trace that receives them."""

import time
from collections.abc import Iterator

import pytest

from shopr1_service.monitoring.spans import EnginePass, current_trace, record_passes, span

Span = tuple[str, float, float, dict[str, int]]


class Recorder:
    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, name: str, start_s: float, end_s: float, **attributes: int) -> None:
        self.spans.append((name, start_s, end_s, attributes))


@pytest.fixture
def trace() -> Iterator[Recorder]:
    recorder = Recorder()
    token = current_trace.set(recorder)
    yield recorder
    current_trace.reset(token)


def test_a_span_has_the_times_of_its_block(trace: Recorder) -> None:
    before_s = time.perf_counter()
    with span("prepare"):
        inside_s = time.perf_counter()
    [(name, start_s, end_s, attributes)] = trace.spans
    assert (name, attributes) == ("prepare", {})
    assert before_s <= start_s <= inside_s <= end_s <= time.perf_counter()


def test_a_block_that_fails_is_recorded_too(trace: Recorder) -> None:
    with pytest.raises(ZeroDivisionError), span("prepare"):
        raise ZeroDivisionError
    assert [name for name, *_ in trace.spans] == ["prepare"]


def test_each_pass_is_recorded_once(trace: Recorder) -> None:
    first, second = EnginePass(2, 30, start_s=5.0, end_s=6.0), EnginePass(2, 30, start_s=7.0, end_s=9.0)
    record_passes([first, first, second], submitted_s=4.0)
    assert trace.spans == [
        ("queue", 4.0, 5.0, {}),
        ("engine", 5.0, 6.0, {"num_groups": 2, "num_tokens": 30}),
        ("queue", 4.0, 7.0, {}),
        ("engine", 7.0, 9.0, {"num_groups": 2, "num_tokens": 30}),
    ]


def test_passes_that_have_not_ended_end_now(trace: Recorder) -> None:
    before_s = time.perf_counter()
    record_passes([None, EnginePass(1, 2, start_s=before_s)], submitted_s=before_s)
    assert [name for name, *_ in trace.spans] == ["queue", "queue", "engine"]
    dropped, queued, computed = (end_s for _, _, end_s, _ in trace.spans)
    assert queued == before_s
    assert before_s <= dropped <= computed <= time.perf_counter()


def test_without_a_trace_nothing_is_recorded() -> None:
    assert current_trace.get() is None
    with span("prepare"):
        pass
    record_passes([EnginePass(1, 2)], submitted_s=0.0)


def test_the_end_of_a_pass() -> None:
    each = EnginePass(1, 2, start_s=time.perf_counter() - 5.0)
    duration_s = each.end()
    assert each.end_s == each.start_s + duration_s
    assert 5.0 <= duration_s < 60.0
