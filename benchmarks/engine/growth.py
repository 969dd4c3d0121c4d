"""Cost by the number of completions and by the length of the prompt."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from benchmarks.engine.baselines import batch_certainties
from benchmarks.meters import interleaved_s
from benchmarks.report import Report
from benchmarks.subject import Subject
from benchmarks.workloads import Plan, Shape

ROUNDS_BUDGET_S = 60.0
"""No further round of a shape starts after this time."""
KEEP_MAX_S = 180.0
"""A batch that is expected to take longer is skipped."""


@dataclass(frozen=True)
class Point:
    """Times of one shape.

    Attributes:
        keep_s: of the batch with `logits_to_keep`; None where it takes too long or too much memory.
    """

    shape: Shape
    engine_s: float
    keep_s: float | None


def measure_growth(subject: Subject, plan: Plan, num_runs: int, report: Report) -> dict[Shape, Point]:
    """Times of the engine and of the batch at each shape of both curves."""
    points: dict[Shape, Point] = {}
    for shape in dict.fromkeys([*plan.by_completions, *plan.by_prompt]):
        runs_keep = _expected_keep_s(points.values(), shape) <= KEEP_MAX_S
        points[shape] = _point(subject, shape, num_runs, runs_keep=runs_keep)
        _add(points[shape], report)
    return points


def _point(subject: Subject, shape: Shape, num_runs: int, *, runs_keep: bool) -> Point:
    group = subject.workloads.group(shape)

    def engine() -> None:
        subject.run_new_prompt(shape)

    def keep() -> None:
        batch_certainties(subject.model, group, keeps_all=False)

    if runs_keep:
        with contextlib.suppress(torch.OutOfMemoryError):
            engine_s, keep_s = interleaved_s(num_runs, engine, keep, budget_s=ROUNDS_BUDGET_S)
            return Point(shape, engine_s, keep_s)
    return Point(shape, interleaved_s(num_runs, engine, budget_s=ROUNDS_BUDGET_S)[0], None)


def _expected_keep_s(points: Iterable[Point], shape: Shape) -> float:
    """Extrapolation from the largest batch so far, in proportion to the tokens."""
    times_s = {point.shape.num_batch_tokens: point.keep_s for point in points if point.keep_s is not None}
    if not times_s:
        return 0.0
    num_tokens = max(times_s)
    return times_s[num_tokens] * shape.num_batch_tokens / num_tokens


def _add(point: Point, report: Report) -> None:
    report.add(point.shape, "engine", point.engine_s, "s")
    if point.keep_s is not None:
        report.add(point.shape, "keep", point.keep_s, "s")
        report.add(point.shape, "keep / engine", point.keep_s / point.engine_s, "x")
    report.add(point.shape, "ideal", point.shape.ideal_ratio, "x")
