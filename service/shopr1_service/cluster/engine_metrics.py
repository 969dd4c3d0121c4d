"""What engines count, shown by the HTTP side beside what it counts itself."""

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import Metric

from shopr1_service.monitoring.metrics import ENGINE_FAMILIES, Metrics

LABEL = "engine"
_SHOWN = ENGINE_FAMILIES | {
    "shopr1_ready",
    "shopr1_rejected_requests",
    "shopr1_phase_duration_seconds",
    "process_resident_memory_bytes",
    "process_cpu_seconds",
}
"""The rest is counted by the HTTP side: requests, rewards, and each update once."""


@dataclass(frozen=True)
class Scrape:
    """Of one engine."""

    engine: str
    families: tuple[Metric, ...]

    @classmethod
    def of(cls, engine: str, metrics: Metrics) -> "Scrape":
        return cls(engine, tuple(each for each in metrics.registry.collect() if each.name in _SHOWN))


def labelled(scrapes: Iterable[Scrape]) -> list[Metric]:
    """All of them, each number with the engine that it is of."""
    families = []
    for scrape in scrapes:
        for family in scrape.families:
            family.samples = [
                sample._replace(labels={**sample.labels, LABEL: scrape.engine}) for sample in family.samples
            ]
            families.append(family)
    return families
