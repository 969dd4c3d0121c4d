"""Prometheus metrics of the service. Base units, one registry per application."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Metric,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from shopr1_client.wire import Reason
from shopr1_service import __version__
from shopr1_service.core import EngineStats, ScoredGroup
from shopr1_service.monitoring.policy_metrics import PolicyMetrics
from shopr1_service.monitoring.training_metrics import TrainingMetrics

__all__ = ["CONTENT_TYPE_LATEST", "ENGINE_FAMILIES", "Metrics", "Phase"]

# 1 ms to 131 s in powers of two, then 5 and 10 minutes: a rule-only group to a long prompt on a CPU.
_SECONDS_BUCKETS = (*(0.001 * 2**k for k in range(18)), 300.0, 600.0)
_GROUPS_BUCKETS = (1, 2, 4, 8, 16, 32, 64)

ENGINE_FAMILIES = frozenset(
    f"shopr1_{name}"
    for name in (
        "engine_heartbeat_timestamp_seconds",
        "queue_tokens",
        "max_queue_tokens",
        "engine_tokens",
        "batch_groups",
        "out_of_memory",
        "prefix_cache_tokens",
        "prefix_cache_bytes",
        "prefix_cache_evicted_chunks",
        "policy_info",
        "policy_number",
        "policy_loaded_timestamp_seconds",
        "loaded_adapters",
    )
)
"""What only a process with an engine knows."""

_QUEUE_FULL = "queue_full"
"""Why requests are rejected."""

# A series more for each counter and histogram, which Prometheus makes no use of.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Phase(StrEnum):
    """Parts of the time a request takes."""

    PREPARE = "prepare"
    """Parsing completions, rules, tokenising."""
    QUEUE = "queue"
    """Waiting for the engine, per group."""
    ENGINE = "engine"
    """Forward and head, per batch of groups that were measured together."""


class Metrics:
    """All metrics, and what is recorded in them.

    Args:
        max_runs: training runs that are told apart (`TrainingMetrics`).
        max_queue_tokens: how much may wait for the engine.
    """

    def __init__(self, *, max_runs: int = 32, max_queue_tokens: int = 0) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._training = TrainingMetrics(self.registry, max_runs)
        self._former = EngineStats()
        counter, histogram = self._counter, self._histogram
        self._requests = counter("requests", "HTTP requests answered.", "method", "route", "status")
        self._request_seconds = histogram(
            "request_duration_seconds", "Time from the request's first byte to its answer.", "route"
        )
        self._phase_seconds = histogram(
            "phase_duration_seconds",
            "Time of the phases: prepare per request, queue per group, engine per batch of groups.",
            "phase",
        )
        self._fallbacks = counter(
            "fallback_rewards",
            "Unscorable rollouts that a trainer was answered with a number all the same.",
            "dialect",
            "reason",
        )
        self._cache_tokens = counter(
            "prefix_cache_tokens",
            "Prompt tokens by whether their keys and values were kept from before.",
            "outcome",
        )
        self._cache_evictions = counter(
            "prefix_cache_evicted_chunks", "Pieces of prompts dropped to make room."
        )
        self._cache_bytes = self._gauge("prefix_cache_bytes", "Keys and values of prompts that are kept.")
        self._queue_tokens = self._gauge("queue_tokens", "Tokens that wait for the engine.")
        self._gauge("max_queue_tokens", "How many may wait; beyond, requests are refused.").set(
            max_queue_tokens
        )
        self._rejections = counter("rejected_requests", "Requests that were refused, by why.", "reason")
        self._rejections.labels(_QUEUE_FULL)  # 0 before the first: rates of it then have a value
        self._repeats = counter(
            "repeated_requests",
            "Requests that got the answer of a twin: joined it, or it was answered.",
            "how",
        )
        self._batch_tokens = counter("engine_tokens", "Tokens that the engine was given.")
        self._batch_groups = self._histogram(
            "batch_groups", "Prompts that were measured together.", buckets=_GROUPS_BUCKETS
        )
        self._out_of_memory = counter(
            "out_of_memory", "Forwards that the device's memory did not suffice for."
        )
        self._rollout_log_dropped = counter(
            "rollout_log_dropped", "Rollouts that are missing in the rollout log, by why.", "reason"
        )
        self.policy = PolicyMetrics(self.registry, _SECONDS_BUCKETS)
        self._gauge("build_info", "The service; always 1.", "version").labels(__version__).set(1)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"shopr1_{name}", what, labels, registry=self.registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(f"shopr1_{name}", what, labels, registry=self.registry)

    def _histogram(
        self, name: str, what: str, *labels: str, buckets: Sequence[float] = _SECONDS_BUCKETS
    ) -> Histogram:
        return Histogram(f"shopr1_{name}", what, labels, buckets=buckets, registry=self.registry)

    def watch(self, is_ready: Callable[[], bool], heartbeat_age_s: Callable[[], float]) -> None:
        """Show at every scrape what these say."""
        self._gauge("ready", "Whether it can score: 1, else 0.").set_function(lambda: float(is_ready()))
        self._gauge("engine_heartbeat_timestamp_seconds", "The engine's last sign of life.").set_function(
            lambda: time.time() - heartbeat_age_s()
        )

    def record_request(self, method: str, route: str, status: int, duration_s: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(route).observe(duration_s)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Record the time that the block takes."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.record_phase(phase, time.perf_counter() - start_s)

    def record_phase(self, phase: Phase, duration_s: float) -> None:
        self._phase_seconds.labels(phase.value).observe(duration_s)

    def observe(self, scored: ScoredGroup) -> None:
        """Count a scored group (an `Observer`)."""
        self._training.observe(scored)

    def record_fallback(self, dialect: str, reason: Reason) -> None:
        self._fallbacks.labels(dialect, reason.value).inc()

    def record_queue(self, num_tokens: int) -> None:
        self._queue_tokens.set(num_tokens)

    def record_rejection(self, reason: str) -> None:
        self._rejections.labels(reason).inc()

    def record_repeat(self, how: str) -> None:
        self._repeats.labels(how).inc()

    def record_rollout_log_dropped(self, reason: str, num_rollouts: int) -> None:
        self._rollout_log_dropped.labels(reason).inc(num_rollouts)

    def record_batch(self, num_groups: int, num_tokens: int) -> None:
        self._batch_groups.observe(num_groups)
        self._batch_tokens.inc(num_tokens)

    def record_engine(self, stats: EngineStats) -> None:
        """Take over what an engine has counted since the last time."""
        former, self._former = self._former, copy.deepcopy(stats)
        self._out_of_memory.inc(stats.num_out_of_memory - former.num_out_of_memory)
        cache, former_cache = stats.cache, former.cache
        self._cache_tokens.labels("hit").inc(cache.num_hit_tokens - former_cache.num_hit_tokens)
        self._cache_tokens.labels("miss").inc(cache.num_missed_tokens - former_cache.num_missed_tokens)
        self._cache_evictions.inc(cache.num_evicted_chunks - former_cache.num_evicted_chunks)
        self._cache_bytes.set(cache.num_bytes)

    def render(self, of_engines: Iterable[Metric] | None = None) -> bytes:
        """All in the text format that Prometheus scrapes.

        Args:
            of_engines: families of engines elsewhere, in place of those of which this process has nothing to
                say then, and beside the others. None: the engine is in this process.
        """
        families = list(self.registry.collect())
        if of_engines is not None:
            families = [each for each in families if each.name not in ENGINE_FAMILIES] + list(of_engines)
        return generate_latest(_Joined(families))


class _Joined(Collector):
    """Families, each name once, as the text format wants them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families: dict[str, Metric] = {}
        for family in families:
            known = self._families.setdefault(family.name, family)
            if known is not family:
                known.samples.extend(family.samples)

    def collect(self) -> Iterable[Metric]:
        return self._families.values()
