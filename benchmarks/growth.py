"""How the cost grows with the completions of a prompt and with its length."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from baselines import batch_certainties
from meters import in_turns_s
from report import Report
from subject import Subject
from workloads import Plan, Shape

TURNS_BUDGET_S = 60.0
"""When a shape's median gets no further turn."""
KEEP_MAX_S = 180.0
"""A batch that would take longer is not run."""


@dataclass(frozen=True)
class Point:
    """Times of one shape.

    Attributes:
        keep_s: None where it took too long or too much memory.
    """

    shape: Shape
    engine_s: float
    keep_s: float | None


def measure_growth(subject: Subject, plan: Plan, num_runs: int, report: Report) -> dict[Shape, Point]:
    """The engine and the batch at each shape of both curves."""
    points: dict[Shape, Point] = {}
    for shape in dict.fromkeys([*plan.by_completions, *plan.by_prompt]):
        runs_keep = _expected_keep_s(points.values(), shape) <= KEEP_MAX_S
        points[shape] = _point(subject, shape, num_runs, runs_keep=runs_keep)
        _note(points[shape], report)
    return points


def _point(subject: Subject, shape: Shape, num_runs: int, *, runs_keep: bool) -> Point:
    group = subject.workloads.group(shape)

    def engine() -> None:
        subject.measure_unknown(shape)

    def keep() -> None:
        batch_certainties(subject.model, group, keeps_all=False)

    if runs_keep:
        with contextlib.suppress(torch.OutOfMemoryError):
            engine_s, keep_s = in_turns_s(num_runs, engine, keep, budget_s=TURNS_BUDGET_S)
            return Point(shape, engine_s, keep_s)
    return Point(shape, in_turns_s(num_runs, engine, budget_s=TURNS_BUDGET_S)[0], None)


def _expected_keep_s(points: Iterable[Point], shape: Shape) -> float:
    """From the largest batch so far, in proportion to the tokens."""
    times_s = {point.shape.num_batch_tokens: point.keep_s for point in points if point.keep_s is not None}
    if not times_s:
        return 0.0
    num_tokens = max(times_s)
    return times_s[num_tokens] * shape.num_batch_tokens / num_tokens


def _note(point: Point, report: Report) -> None:
    report.note(point.shape, "engine", point.engine_s, "s")
    if point.keep_s is not None:
        report.note(point.shape, "keep", point.keep_s, "s")
        report.note(point.shape, "keep / engine", point.keep_s / point.engine_s, "x")
    report.note(point.shape, "ideal", point.shape.ideal_ratio, "x")
