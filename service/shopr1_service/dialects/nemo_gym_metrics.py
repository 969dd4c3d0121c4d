"""NeMo Gym's `/aggregate_metrics`: statistics of every number in the answers of `/verify`.

Names and grouping are NeMo Gym's own: `mean/reward`, `max/reward`, … per task and over all rollouts.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

_TASK, _ROLLOUT = "_ng_task_index", "_ng_rollout_index"
_FAILURE = "_ng_failure_class"
_LARGEST = 1e100  # what is larger is no measurement, and its square could overflow

Rollout = Mapping[str, Any]


class AggregateMetrics(BaseModel):
    """Statistics by name; `key_metrics` are the means over all rollouts."""

    group_level_metrics: list[dict[str, int | float]] = []
    agent_metrics: dict[str, float] = {}
    key_metrics: dict[str, float] = {}


def aggregate(rollouts: Sequence[Rollout]) -> AggregateMetrics:
    """Statistics per task and over all rollouts but those that are marked as failed."""
    scored = [rollout for rollout in rollouts if rollout.get(_FAILURE) is None]
    tasks: dict[int, list[Rollout]] = {}
    for rollout in scored:
        tasks.setdefault(_task(rollout), []).append(rollout)
    metrics = _metrics(scored)
    return AggregateMetrics(
        group_level_metrics=[{**_metrics(tasks[task]), _TASK: task} for task in sorted(tasks)],
        agent_metrics=metrics,
        key_metrics={name: value for name, value in metrics.items() if name.startswith("mean/")},
    )


def _task(rollout: Rollout) -> int:
    task = rollout.get(_TASK, 0)
    return task if isinstance(task, int) else 0


def _metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    columns: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in _numbers(rollout).items():
            columns.setdefault(name, []).append(value)
    return {
        f"{statistic}/{name}": compute(values)
        for name, values in columns.items()
        for statistic, compute in _STATISTICS.items()
    }


def _numbers(rollout: Rollout) -> dict[str, float]:
    response = rollout.get("response")
    usage = response.get("usage") if isinstance(response, dict) else None
    return {
        name: float(value)
        for name, value in {**rollout, **(usage if isinstance(usage, dict) else {})}.items()
        if isinstance(value, int | float) and abs(value) <= _LARGEST and name not in (_TASK, _ROLLOUT)
    }


def _std(values: Sequence[float]) -> float:
    """Of the sample; 0 for one value, as NeMo Gym has it."""
    if len(values) < 2:
        return 0.0
    mean = statistics.fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


_STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "max": max,
    "min": min,
    "median": statistics.median,
    "std": _std,
}
