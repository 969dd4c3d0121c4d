"""Gauges of the Unix time of an event's last occurrence.

They keep the monotonic clock and convert it at each scrape, so that setting the system clock does not change
the event's age, `time() - <metric>` in Prometheus.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class TimestampGauge(Collector):
    """Time of the last occurrence, per label values. Thread-safe.

    Args:
        name: full name, such as `shopr1_last_scored_timestamp_seconds`.
        text: help text.
        label_names: may be empty.
    """

    def __init__(self, name: str, text: str, *label_names: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._label_names = label_names
        self._times_s: dict[tuple[str, ...], float] = {}
        registry.register(self)

    def set_now(self, *labels: str) -> None:
        """Record that the event occurs now."""
        self._times_s[labels] = time.monotonic()

    def remove(self, *labels: str) -> None:
        """Drop the series, if there is one."""
        self._times_s.pop(labels, None)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Times in seconds since 1970."""
        family = GaugeMetricFamily(self._name, self._text, labels=self._label_names)
        offset_s = time.time() - time.monotonic()
        for labels, time_s in list(self._times_s.items()):
            family.add_metric(labels, offset_s + time_s)
        yield family
