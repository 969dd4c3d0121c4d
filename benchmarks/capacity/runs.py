"""A run of the simulation: one setting and its results."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import islice

import numpy as np

from benchmarks.capacity.cluster import Cluster, RoundRobin, Router, Sessions, Size, run_closed, run_open
from benchmarks.capacity.engine import Costs, Group
from benchmarks.capacity.trace import Request
from shopr1_service.cluster.prefix_affinity import Affinity

ROUTERS: Mapping[str, Callable[[], Router]] = {
    "affinity": Affinity,
    "affinity, missing twice": partial(Affinity, missing_weight=2),
    "round robin": RoundRobin,
}
CONCURRENT_SESSIONS = 4
"""Per engine, at full load."""
LOADS = (0.4, 0.8)
"""Shares of the engines' capacity with unlimited prefix caches and no waiting."""
SESSIONS_EACH, MIN_SESSIONS = 8, 200
WINDOW = (0.25, 0.9)
"""Groups that count, as shares of all in the order of completion: without the start and the end of a run."""
INGRESS_LOAD = 0.6
"""Load of proxies and ingresses, where their number is chosen."""


class Ingresses(StrEnum):
    """Number of ingresses, and the way to them.

    Except with `ONE`, there are as many as the load needs, each with a router of its own.
    """

    ONE = "one ingress"
    IN_TURN = "ingresses in turn"
    BY_SESSION = "ingresses by session"


@dataclass(frozen=True)
class Setting:
    """One simulated setting.

    Attributes:
        load: one of `LOADS`; None for full load, where sessions follow each other immediately.
    """

    router: str
    num_replicas: int
    load: float | None
    ingresses: Ingresses

    def __str__(self) -> str:
        load = "full" if self.load is None else f"load {self.load:g}"
        return f"{self.num_replicas} engines, {load}, {self.ingresses}, {self.router}"


@dataclass(frozen=True)
class Result:
    """Means and quantiles over the groups of the window."""

    groups_per_s: float
    tokens_per_s: float
    p50_s: float
    p99_s: float
    hit_rate: float
    engines_busy: float
    ingress_busy: float
    proxy_busy: float
    num_ingresses: float


@dataclass(frozen=True)
class World:
    """Inputs that all settings share."""

    costs: Costs
    trace: Sequence[Request]
    cache_tokens: int
    seed: int

    def sessions(self) -> Sessions:
        return Sessions(self.trace, self.seed)

    @property
    def ideal_group_s(self) -> float:
        """Mean engine time of a group with an unlimited prefix cache."""
        sessions = self.sessions()
        return sessions.mean_ideal_s(self.costs) / sessions.mean_steps()


def simulate(setting: Setting, world: World) -> Result:
    """Run one setting."""
    sessions, costs = world.sessions(), world.costs
    ideal_s = sessions.mean_ideal_s(costs)
    size = size_of(setting, world)
    cluster = Cluster(size, costs, ROUTERS[setting.router])
    num_sessions = max(MIN_SESSIONS, SESSIONS_EACH * setting.num_replicas)
    if setting.load is None:
        run_closed(cluster, list(islice(sessions, num_sessions)), CONCURRENT_SESSIONS * setting.num_replicas)
    else:
        run_open(cluster, sessions, setting.load * setting.num_replicas / ideal_s, num_sessions)
    return _result(cluster, size, costs)


def size_of(setting: Setting, world: World) -> Size:
    """Size of the cluster: one proxy and one ingress, or so many that they never saturate."""
    size = Size(setting.num_replicas, cache_tokens=world.cache_tokens)
    if setting.ingresses is Ingresses.ONE:
        return size
    rate = setting.num_replicas / world.ideal_group_s / INGRESS_LOAD
    ingress_s = mean_ingress_s(world, setting.num_replicas)
    return replace(
        size,
        by_session=setting.ingresses is Ingresses.BY_SESSION,
        num_ingresses=math.ceil(rate * ingress_s),
        num_proxies=math.ceil(rate * world.costs.proxy_s),
    )


def mean_ingress_s(world: World, num_replicas: int) -> float:
    """Mean CPU time of the ingress for the trace's groups."""
    groups = [Group(request.path, request.completion_tokens) for request in world.trace]
    return statistics.fmean(world.costs.ingress_group_s(group, num_replicas) for group in groups)


def _result(cluster: Cluster, size: Size, costs: Costs) -> Result:
    first, last = (int(share * len(cluster.done)) for share in WINDOW)
    groups = cluster.done[first:last]
    duration_s = groups[-1].done_s - groups[0].done_s
    rate = len(groups) / duration_s
    latencies_s = [group.latency_s for group in groups]
    ingress_s = statistics.fmean(costs.ingress_group_s(group, size.num_replicas) for group in groups)
    return Result(
        groups_per_s=rate,
        tokens_per_s=sum(group.all_tokens for group in groups) / duration_s,
        p50_s=float(np.quantile(latencies_s, 0.5)),
        p99_s=float(np.quantile(latencies_s, 0.99)),
        hit_rate=sum(g.num_hit for g in groups) / sum(g.prompt_tokens for g in groups),
        engines_busy=rate * statistics.fmean(group.engine_s for group in groups) / size.num_replicas,
        ingress_busy=rate * ingress_s / size.num_ingresses,
        proxy_busy=rate * costs.proxy_s / size.num_proxies,
        num_ingresses=size.num_ingresses,
    )
