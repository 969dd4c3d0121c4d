"""When things happened, as gauges of Unix time.

Kept on the monotonic clock and turned into Unix time at each scrape, so that a clock that is set does not
change how long ago something was: `time() - <metric>` in Prometheus is its age.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class TimestampGauge(Collector):
    """One gauge: when it happened last, per label values. May be used from several threads.

    Args:
        name: in full, such as `shopr1_last_scored_timestamp_seconds`.
        what: help text.
        label_names: may be empty.
    """

    def __init__(self, name: str, what: str, *label_names: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._what = what
        self._label_names = label_names
        self._happened_s: dict[tuple[str, ...], float] = {}
        registry.register(self)

    def mark(self, *labels: str) -> None:
        """It happens now."""
        self._happened_s[labels] = time.monotonic()

    def remove(self, *labels: str) -> None:
        """Forget that it ever happened."""
        self._happened_s.pop(labels, None)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Seconds since 1970."""
        family = GaugeMetricFamily(self._name, self._what, labels=self._label_names)
        offset_s = time.time() - time.monotonic()
        for labels, happened_s in list(self._happened_s.items()):
            family.add_metric(labels, offset_s + happened_s)
        yield family
