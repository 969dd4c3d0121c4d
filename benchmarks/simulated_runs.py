"""A run of the simulation: one setting, and what comes of it."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import islice

import numpy as np

from shopr1_service.cluster.prefix_affinity import Affinity
from simulated_cluster import Cluster, RoundRobin, Router, Sessions, Size, run_closed, run_open
from simulated_engine import Costs, Group
from traces import Request

ROUTERS: Mapping[str, Callable[[], Router]] = {
    "affinity": Affinity,
    "affinity, missing twice": partial(Affinity, missing_weight=2),
    "round robin": RoundRobin,
}
AT_ONCE = 4
"""Sessions of each engine, where everything is to be full."""
SESSIONS_EACH, MIN_SESSIONS = 8, 200
WINDOW = (0.25, 0.9)
"""Which groups count, in the order in which they are done: no cluster that fills, and none that runs out."""
FRONT_LOAD = 0.6
"""Of proxies and ingresses, where there are enough of them."""


class Front(StrEnum):
    """Proxies and ingresses."""

    ONE = "one ingress"
    IN_TURN = "ingresses in turn"
    BY_SESSION = "ingresses by session"
    """As many as there must be, each with a router of its own."""


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        load: None where sessions follow each other at once.
    """

    router: str
    num_replicas: int
    load: float | None
    front: Front

    def __str__(self) -> str:
        load = "full" if self.load is None else f"load {self.load:g}"
        return f"{self.num_replicas} engines, {load}, {self.front}, {self.router}"


@dataclass(frozen=True)
class Outcome:
    """What has come of it; of a second or of a group, in the window."""

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
    """What is the same for all settings."""

    costs: Costs
    trace: Sequence[Request]
    max_kept_tokens: int
    seed: int

    def sessions(self) -> Sessions:
        return Sessions(self.trace, self.seed)

    @property
    def ideal_group_s(self) -> float:
        """Of an engine that keeps all it ever had."""
        sessions = self.sessions()
        return sessions.mean_ideal_s(self.costs) / sessions.mean_steps()


def simulate(setting: Setting, world: World) -> Outcome:
    sessions, costs = world.sessions(), world.costs
    ideal_s = sessions.mean_ideal_s(costs)
    size = size_of(setting, world)
    cluster = Cluster(size, costs, ROUTERS[setting.router])
    num_sessions = max(MIN_SESSIONS, SESSIONS_EACH * setting.num_replicas)
    if setting.load is None:
        run_closed(cluster, list(islice(sessions, num_sessions)), AT_ONCE * setting.num_replicas)
    else:
        run_open(cluster, sessions, setting.load * setting.num_replicas / ideal_s, num_sessions)
    return _outcome(cluster, size, costs)


def size_of(setting: Setting, world: World) -> Size:
    """With one proxy and ingress, or as many as are never full, whatever engines do."""
    size = Size(setting.num_replicas, max_kept_tokens=world.max_kept_tokens)
    if setting.front is Front.ONE:
        return size
    rate = setting.num_replicas / world.ideal_group_s / FRONT_LOAD
    front_s = mean_front_s(world, setting.num_replicas)
    return replace(
        size,
        by_session=setting.front is Front.BY_SESSION,
        num_ingresses=math.ceil(rate * front_s),
        num_proxies=math.ceil(rate * world.costs.proxy_s),
    )


def mean_front_s(world: World, num_replicas: int) -> float:
    """Of the trace's groups."""
    groups = [Group(request.path, request.own_tokens) for request in world.trace]
    return statistics.fmean(world.costs.front_s(group, num_replicas) for group in groups)


def _outcome(cluster: Cluster, size: Size, costs: Costs) -> Outcome:
    first, last = (int(share * len(cluster.done)) for share in WINDOW)
    groups = cluster.done[first:last]
    duration_s = groups[-1].done_s - groups[0].done_s
    rate = len(groups) / duration_s
    latencies_s = [group.latency_s for group in groups]
    front_s = statistics.fmean(costs.front_s(group, size.num_replicas) for group in groups)
    return Outcome(
        groups_per_s=rate,
        tokens_per_s=sum(group.all_tokens for group in groups) / duration_s,
        p50_s=float(np.quantile(latencies_s, 0.5)),
        p99_s=float(np.quantile(latencies_s, 0.99)),
        hit_rate=sum(g.num_hit for g in groups) / sum(g.prompt_tokens for g in groups),
        engines_busy=rate * statistics.fmean(group.engine_s for group in groups) / size.num_replicas,
        ingress_busy=rate * front_s / size.num_ingresses,
        proxy_busy=rate * costs.proxy_s / size.num_proxies,
        num_ingresses=size.num_ingresses,
    )
