"""Prometheus metrics of the service: base units, one registry per application.

Metrics of trainings are in `training_metrics.py`.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial

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

from shopr1_client.wire import PolicyInfo, Reason
from shopr1_service import __version__
from shopr1_service.core import EngineStats, ScoredGroup
from shopr1_service.memory.budget import UNLIMITED, Account, MemoryBudget
from shopr1_service.monitoring.timestamp_gauge import TimestampGauge
from shopr1_service.monitoring.training_metrics import TrainingMetrics

__all__ = ["CONTENT_TYPE_LATEST", "ENGINE_FAMILIES", "Metrics", "Phase", "PolicyMetrics"]

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
        "policy_rejected_path",
        "policy_remarks",
        "policy_number",
        "policy_loaded_timestamp_seconds",
        "loaded_adapters",
    )
)
"""Metrics that only a process with an engine has."""

# Counters and histograms have another series with their time of creation, which Prometheus does not use.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Phase(StrEnum):
    """Parts of the time a request takes."""

    PREPARE = "prepare"
    """Parsing completions, rules, tokenising."""
    QUEUE = "queue"
    """Waiting for the engine, per group."""
    ENGINE = "engine"
    """Forward and head, per batch of groups."""


class _Factory:
    """Makes metrics whose names begin with `shopr1_` in a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"shopr1_{name}", text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"shopr1_{name}", text, labels, registry=self.registry)

    def histogram(
        self, name: str, text: str, *labels: str, buckets: Sequence[float] = _SECONDS_BUCKETS
    ) -> Histogram:
        return Histogram(f"shopr1_{name}", text, labels, buckets=buckets, registry=self.registry)


class PolicyMetrics:
    """Versions of the policy, and updates of its weights."""

    def __init__(self, make: _Factory) -> None:
        self._info = make.gauge(
            "policy_info", "The loaded policy; always 1.", "model", "version", "dtype", "head", "forward"
        )
        self._rejected = make.gauge(
            "policy_rejected_path", "A faster path that was not taken; always 1.", "path", "reason"
        )
        self._remarks = make.gauge("policy_remarks", "Remarks of the check at load; GET /info has the texts.")
        self._loaded = TimestampGauge(
            "shopr1_policy_loaded_timestamp_seconds",
            "Time at which the policy was loaded.",
            registry=make.registry,
        )
        self._number = make.gauge("policy_number", "Number of the default version: changes since the start.")
        self._adapters = make.gauge("loaded_adapters", "Loaded versions of LoRA adapters.")
        self._updates = make.counter(
            "policy_updates", "Updates of the policy's weights by source.", "source", "outcome"
        )
        for source in ("checkpoint", "upload", "transfer"):  # 0 before the first: its increase is 1
            for outcome in ("done", "failed"):
                self._updates.labels(source, outcome)
        self._update_seconds = make.histogram(
            "policy_update_duration_seconds", "Time from an update's first byte to its end.", "source"
        )
        self._update_bytes = make.counter("policy_update_bytes", "Bytes of received weights.", "source")
        self._swap_seconds = make.histogram(
            "policy_swap_duration_seconds", "Time without scoring while weights are swapped.", "source"
        )

    def record_loaded(self, info: PolicyInfo, num_adapters: int = 0) -> None:
        """Record a change of the loaded versions.

        Args:
            num_adapters: loaded versions of adapters.
        """
        self._loaded.set_now()
        self._info.clear()
        self._info.labels(info.model, info.version, info.dtype, info.head, info.forward).set(1)
        self._rejected.clear()
        for rejected in info.rejected_paths:
            self._rejected.labels(rejected.path, rejected.reason).set(1)
        self._remarks.set(len(info.remarks))
        self._number.set(info.number)
        self._adapters.set(num_adapters)

    def record_update(self, source: str, duration_s: float, num_bytes: int, *, is_done: bool) -> None:
        """Record the end of an update."""
        self._updates.labels(source, "done" if is_done else "failed").inc()
        self._update_seconds.labels(source).observe(duration_s)
        self._update_bytes.labels(source).inc(num_bytes)

    def record_swap(self, source: str, pause_s: float) -> None:
        """Record a swap of weights."""
        self._swap_seconds.labels(source).observe(pause_s)


class Metrics:
    """All metrics, and the methods that record them.

    Args:
        max_runs: training runs with series of their own (`TrainingMetrics`).
        max_queue_tokens: the queue's capacity.
        max_client_memory_bytes: limit of `memory`.

    Attributes:
        memory: the budget of what clients make this process keep, whose accounts are among the metrics.
    """

    def __init__(
        self,
        *,
        max_runs: int = 32,
        max_queue_tokens: int = 0,
        max_client_memory_bytes: int = UNLIMITED,
    ) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._make = make = _Factory(self.registry)
        self.memory = MemoryBudget(max_client_memory_bytes, lambda: self.record_rejection("memory"))
        self._training = TrainingMetrics(self.registry, max_runs, self.memory)
        self.policy = PolicyMetrics(make)
        self._last_stats = EngineStats()
        self._requests = make.counter("requests", "Answered HTTP requests.", "method", "route", "status")
        self._request_seconds = make.histogram(
            "request_duration_seconds", "Time from the request's first byte to its answer.", "route"
        )
        self._phase_seconds = make.histogram(
            "phase_duration_seconds",
            "Time of the phases: prepare per request, queue per group, engine per batch of groups.",
            "phase",
        )
        self._fallbacks = make.counter(
            "fallback_rewards",
            "Unscorable rollouts for which a trainer received a number.",
            "dialect",
            "reason",
        )
        self._cache_tokens = make.counter(
            "prefix_cache_tokens", "Prompt tokens looked up in the prefix cache: hit or miss.", "outcome"
        )
        self._cache_evictions = make.counter(
            "prefix_cache_evicted_chunks", "Chunks evicted from the prefix cache."
        )
        self._cache_bytes = make.gauge("prefix_cache_bytes", "Size of the prefix cache.")
        self._queue_tokens = make.gauge("queue_tokens", "Tokens in the queue.")
        make.gauge("max_queue_tokens", "Queue capacity; beyond it requests are rejected.").set(
            max_queue_tokens
        )
        self._rejections = make.counter("rejected_requests", "Rejected requests by reason.", "reason")
        for reason in ("queue_full", "memory"):  # 0 before the first, so that rates have a value
            self._rejections.labels(reason)
        self._watch_memory()
        self._repeats = make.counter(
            "repeated_requests",
            "Requests with the content of another one: joined it, or answered from its result.",
            "how",
        )
        self._retries = make.counter(
            "retried_requests", "Answers to requests that had been counted before, by their id or key."
        )
        self._batch_tokens = make.counter("engine_tokens", "Tokens passed to the engine.")
        self._batch_groups = make.histogram(
            "batch_groups", "Groups in a batch of the engine.", buckets=_GROUPS_BUCKETS
        )
        self._out_of_memory = make.counter("out_of_memory", "Forwards that ran out of device memory.")
        self._rollout_log_dropped = make.counter(
            "rollout_log_dropped", "Rollouts missing from the rollout log, by reason.", "reason"
        )
        make.gauge("build_info", "The service; always 1.", "version").labels(__version__).set(1)

    def watch(self, is_ready: Callable[[], bool], heartbeat_age_s: Callable[[], float]) -> None:
        """Call these at every scrape for readiness and the engine's heartbeat."""
        ready = self._make.gauge("ready", "1 if the service can score, else 0.")
        ready.set_function(lambda: float(is_ready()))
        heartbeat = self._make.gauge("engine_heartbeat_timestamp_seconds", "Time of the engine's heartbeat.")
        heartbeat.set_function(lambda: time.time() - heartbeat_age_s())

    def _watch_memory(self) -> None:
        used = self._make.gauge(
            "client_memory_bytes", "Memory that clients make this process keep.", "account"
        )
        for account in Account:
            used.labels(account.value).set_function(partial(self.memory.num_bytes, account))
        self._make.gauge("max_client_memory_bytes", "Limit of this memory.").set(self.memory.max_bytes)

    def record_request(self, method: str, route: str, status: int, duration_s: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(route).observe(duration_s)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Record the duration of the block."""
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

    def expect_fallbacks(self, dialect: str) -> None:
        """Show a dialect's fallback rewards as 0 before the first, so that rates have a value."""
        for reason in Reason:
            self._fallbacks.labels(dialect, reason.value)

    def record_fallback(self, dialect: str, reason: Reason) -> None:
        self._fallbacks.labels(dialect, reason.value).inc()

    def record_queue(self, num_tokens: int) -> None:
        self._queue_tokens.set(num_tokens)

    def record_rejection(self, reason: str) -> None:
        self._rejections.labels(reason).inc()

    def record_repeat(self, how: str) -> None:
        self._repeats.labels(how).inc()

    def record_retry(self) -> None:
        self._retries.inc()

    def record_rollout_log_dropped(self, reason: str, num_rollouts: int) -> None:
        self._rollout_log_dropped.labels(reason).inc(num_rollouts)

    def record_batch(self, num_groups: int, num_tokens: int) -> None:
        self._batch_groups.observe(num_groups)
        self._batch_tokens.inc(num_tokens)

    def record_engine(self, stats: EngineStats) -> None:
        """Add the increase of an engine's counts since the last call."""
        last, self._last_stats = self._last_stats, copy.deepcopy(stats)
        self._out_of_memory.inc(stats.num_out_of_memory - last.num_out_of_memory)
        self._cache_tokens.labels("hit").inc(stats.cache.num_hit_tokens - last.cache.num_hit_tokens)
        self._cache_tokens.labels("miss").inc(stats.cache.num_missed_tokens - last.cache.num_missed_tokens)
        self._cache_evictions.inc(stats.cache.num_evicted_chunks - last.cache.num_evicted_chunks)
        self._cache_bytes.set(stats.cache.num_bytes)

    def render(self, of_engines: Iterable[Metric] | None = None) -> bytes:
        """All metrics in Prometheus' text format.

        Args:
            of_engines: metrics of engines in other processes. They replace `ENGINE_FAMILIES` of this process
                and join the others. None: the engine is in this process.
        """
        families = list(self.registry.collect())
        if of_engines is not None:
            families = [each for each in families if each.name not in ENGINE_FAMILIES] + list(of_engines)
        return generate_latest(_Joined(families))


class _Joined(Collector):
    """Metrics of several registries, with the samples of each name together, as the text format requires."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families: dict[str, Metric] = {}
        for family in families:
            known = self._families.setdefault(family.name, family)
            if known is not family:
                known.samples.extend(family.samples)

    def collect(self) -> Iterable[Metric]:
        return self._families.values()
