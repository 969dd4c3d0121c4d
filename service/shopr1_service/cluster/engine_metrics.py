"""Numbers that engines report: to Prometheus through the HTTP side, and to Ray's autoscaler."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import Metric

from shopr1_service.monitoring.metrics import ENGINE_FAMILIES, Metrics

LABEL = "engine"
_SCRAPED = ENGINE_FAMILIES | {
    "shopr1_ready",
    "shopr1_client_memory_bytes",
    "shopr1_max_client_memory_bytes",
    "shopr1_rejected_requests",
    "shopr1_phase_duration_seconds",
    "process_resident_memory_bytes",
    "process_cpu_seconds",
}
"""The HTTP side counts the others: requests, rewards, and each update once."""
QUEUED_TOKENS = "queued_tokens"
"""Name under which engines report their queue to Ray (`EngineReplica.record_autoscaling_stats`)."""


@dataclass(frozen=True)
class Scrape:
    """Metrics of one engine."""

    engine: str
    families: tuple[Metric, ...]

    @classmethod
    def of(cls, engine: str, metrics: Metrics) -> "Scrape":
        """Collect the metrics that an engine knows better than the HTTP side."""
        return cls(engine, tuple(each for each in metrics.registry.collect() if each.name in _SCRAPED))


def labelled(scrapes: Iterable[Scrape]) -> list[Metric]:
    """Metrics of all engines, each sample with the name of its engine as a label."""
    families = []
    for scrape in scrapes:
        for family in scrape.families:
            family.samples = [
                sample._replace(labels={**sample.labels, LABEL: scrape.engine}) for sample in family.samples
            ]
            families.append(family)
    return families


class ScalingContext(Protocol):
    """The members of Ray's `AutoscalingContext` that `QueuedTokens` reads."""

    current_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...

    @property
    def total_num_requests(self) -> float: ...


class QueuedTokens:
    """Autoscaling policy of Ray: enough engines to keep the queue of each below a target.

    Busy engines are not removed, also if their queues are empty. Bounds and delays are Ray's.

    Args:
        target_tokens: queued tokens per engine.
    """

    def __init__(self, target_tokens: int) -> None:
        self._target_tokens = target_tokens

    def __call__(self, context: ScalingContext) -> tuple[int, dict[str, Any]]:
        """Number of engines, and an empty state."""
        queued = (context.aggregated_metrics or {}).get(QUEUED_TOKENS, {})
        num_needed = math.ceil(sum(queued.values()) / self._target_tokens)
        num_busy = min(context.current_num_replicas, math.ceil(context.total_num_requests))
        return max(num_needed, num_busy), {}
