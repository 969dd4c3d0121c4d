"""Which weights score, and how they came."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shopr1_client.wire import PolicyInfo
from shopr1_service.monitoring.timestamp_gauge import TimestampGauge

_SOURCES = ("checkpoint", "upload", "transfer")
_OUTCOMES = ("done", "failed")


class PolicyMetrics:
    """Versions of the policy, and updates of its weights.

    Args:
        seconds_buckets: of durations.
    """

    def __init__(self, registry: CollectorRegistry, seconds_buckets: Sequence[float]) -> None:
        self._registry = registry
        self._seconds_buckets = seconds_buckets
        self._info = self._gauge(
            "policy_info", "The loaded policy; always 1.", "model", "version", "dtype", "head", "forward"
        )
        self._loaded = TimestampGauge(
            "shopr1_policy_loaded_timestamp_seconds", "When the policy was loaded.", registry=registry
        )
        self._number = self._gauge(
            "policy_number", "Number of the version that scores what names none: changes since the start."
        )
        self._adapters = self._gauge("loaded_adapters", "Versions of LoRA adapters that are loaded.")
        self._updates = self._counter(
            "policy_updates", "Updates of the policy's weights, by where they came from.", "source", "outcome"
        )
        for source in _SOURCES:  # 0 before the first: the increase to 1 is one
            for outcome in _OUTCOMES:
                self._updates.labels(source, outcome)
        self._update_seconds = self._histogram(
            "policy_update_duration_seconds", "From an update's first byte to its end."
        )
        self._update_bytes = self._counter("policy_update_bytes", "Of weights that came.", "source")
        self._swap_seconds = self._histogram(
            "policy_swap_duration_seconds", "How long nothing was scored while weights were exchanged."
        )

    def record_loaded(self, info: PolicyInfo, num_adapters: int = 0) -> None:
        """What is loaded has changed.

        Args:
            num_adapters: versions of adapters.
        """
        self._loaded.mark()
        self._info.clear()
        self._info.labels(info.model, info.version, info.dtype, info.head, info.forward).set(1)
        self._number.set(info.number)
        self._adapters.set(num_adapters)

    def record_update(self, source: str, duration_s: float, num_bytes: int, *, is_done: bool) -> None:
        """An update has ended."""
        self._updates.labels(source, "done" if is_done else "failed").inc()
        self._update_seconds.labels(source).observe(duration_s)
        self._update_bytes.labels(source).inc(num_bytes)

    def record_swap(self, source: str, pause_s: float) -> None:
        """Weights have been exchanged."""
        self._swap_seconds.labels(source).observe(pause_s)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(f"shopr1_{name}", what, labels, registry=self._registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"shopr1_{name}", what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(
            f"shopr1_{name}", what, ("source",), buckets=self._seconds_buckets, registry=self._registry
        )
