"""Histograms that take all values of a group at once.

The library's own takes one value at a time, with a lock and a search from the first bucket on for each. For
the reward and the terms of a rollout that takes longer than all rules.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class BatchHistogram(Collector):
    """A histogram with labels. Thread-safe.

    Args:
        name: full name, such as `shopr1_reward`.
        text: help text.
        bounds: of the buckets, ascending; there is one more, without bound.
    """

    def __init__(
        self,
        name: str,
        text: str,
        label_names: Sequence[str],
        bounds: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name = name
        self._text = text
        self._label_names = tuple(label_names)
        self._bounds = tuple(map(float, bounds))
        self._series: dict[tuple[str, ...], Series] = {}
        registry.register(self)

    def labels(self, *labels: str) -> "Series":
        """The series with these labels; a new one if there is none."""
        return self._series.setdefault(labels, Series(self._bounds))

    def remove(self, *labels: str) -> None:
        """Drop the series with these labels, if there is one."""
        self._series.pop(labels, None)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The counts up to each bound, and the sums."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._label_names)
        bounds = (*self._bounds, float("inf"))
        names = [floatToGoString(bound) for bound in bounds]  # type: ignore[no-untyped-call]
        for labels, series in list(self._series.items()):
            counts, total = series.read()
            family.add_metric(labels, list(zip(names, accumulate(counts), strict=True)), total)
        yield family


class Series:
    """Values with the same labels."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._lock = threading.Lock()
        self._counts = [0.0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, values: Iterable[float]) -> None:
        """Count values, each in the first bucket whose bound is not below it."""
        bounds, counts = self._bounds, self._counts
        with self._lock:
            for value in values:
                counts[bisect_left(bounds, value)] += 1
                self._sum += value

    def read(self) -> tuple[list[float], float]:
        """The number of values in each bucket, and the sum of all."""
        with self._lock:
            return list(self._counts), self._sum
