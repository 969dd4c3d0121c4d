"""A simulated cluster: proxy, HTTP sides ("ingresses"), routers and engines as queues.

A group passes the proxy, then an ingress, which asks its router for an engine, and then the engine's queue.
The router is the service's own class: it knows what its ingress has sent, but neither the real contents of
prefix caches nor what other ingresses have sent.

Left out: the network, replicas that fail, rejected requests, memory other than the prefix cache. All work of
the HTTP side precedes the engine's.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Protocol

from benchmarks.capacity.engine import Clock, Costs, Engine, Group, Path, Station
from benchmarks.capacity.trace import Request
from shopr1_service.cluster.prefix_affinity import Work
from shopr1_service.scheduling.request_queue import MAX_BATCH_TOKENS


class Router(Protocol):
    """A router: `Affinity`, or a baseline."""

    def ranked(self, work: Work, replicas: Sequence[int]) -> list[int]: ...

    def begin(self, key: Hashable, work: Work, replica: int) -> None: ...

    def end(self, key: Hashable) -> None: ...


class RoundRobin:
    """Each replica in turn."""

    def __init__(self) -> None:
        self._turns = count()

    def ranked(self, work: Work, replicas: Sequence[int]) -> list[int]:
        return [replicas[next(self._turns) % len(replicas)]]

    def begin(self, key: Hashable, work: Work, replica: int) -> None:
        """Ignored."""

    def end(self, key: Hashable) -> None:
        """Ignored."""


@dataclass(frozen=True)
class Size:
    """Number of processes of each kind, and limits of an engine.

    Attributes:
        by_session: all groups of a session pass the same ingress; otherwise ingresses take turns.
        cache_tokens: capacity of an engine's prefix cache.
        max_batch_tokens: of a batch; 0 runs each group alone.
    """

    num_replicas: int
    num_ingresses: int = 1
    num_proxies: int = 1
    by_session: bool = False
    cache_tokens: int = 10**9
    max_batch_tokens: int = MAX_BATCH_TOKENS


class Cluster:
    """A cluster that serves groups in simulated time."""

    def __init__(self, size: Size, costs: Costs, make_router: Callable[[], Router]) -> None:
        self.clock = Clock()
        self.done: list[Group] = []
        self.engines = [
            Engine(self.clock, costs, size.cache_tokens, size.max_batch_tokens)
            for _ in range(size.num_replicas)
        ]
        self.proxy = Station(self.clock, size.num_proxies)
        self.ingresses = [Station(self.clock, 1) for _ in range(size.num_ingresses)]
        self._costs = costs
        self._by_session = size.by_session
        self._routers = [make_router() for _ in self.ingresses]
        # Each ingress starts at another replica: otherwise round-robin ingresses would run in step.
        self._replicas = [
            [*range(start, size.num_replicas), *range(start)]
            for start in (i * size.num_replicas // size.num_ingresses for i in range(size.num_ingresses))
        ]
        self._turns = count()

    def score(self, group: Group, on_done: Callable[[], None] = lambda: None) -> None:
        """Accept a group now. `on_done` is called when it is scored."""
        group.arrived_s = self.clock.now_s
        self.proxy.serve(self._costs.proxy_s, lambda: self._enter_ingress(group, on_done))

    def _enter_ingress(self, group: Group, on_done: Callable[[], None]) -> None:
        number = (group.session if self._by_session else next(self._turns)) % len(self.ingresses)
        duration_s = self._costs.ingress_group_s(group, len(self.engines))
        self.ingresses[number].serve(duration_s, lambda: self._route(number, group, on_done))

    def _route(self, number: int, group: Group, on_done: Callable[[], None]) -> None:
        router, work = self._routers[number], group.work()
        chosen = router.ranked(work, self._replicas[number])[0]
        router.begin(group, work, chosen)
        self.engines[chosen].serve(group, lambda: self._end(router, group, on_done))

    def _end(self, router: Router, group: Group, on_done: Callable[[], None]) -> None:
        router.end(group)
        self.done.append(group)
        on_done()


# --- arrivals -------------------------------------------------------------------------------------

Step = tuple[float, Path, int]
"""Seconds since the start of the session, prompt, number of completion tokens."""


class Sessions:
    """Random copies of the sessions of a trace.

    Copies share the prompt nodes that sessions of the trace share, such as the shop's first page. All other
    nodes are private to a copy.
    """

    def __init__(self, trace: Sequence[Request], seed: int) -> None:
        by_session = defaultdict[int, list[Request]](list)
        for request in trace:
            by_session[request.session].append(request)
        self.recorded = [
            [(r.at_s - rs[0].at_s, r.path, r.completion_tokens) for r in rs] for rs in by_session.values()
        ]
        users = Counter(
            node for steps in self.recorded for node in {n for _, path, _ in steps for n, _ in path}
        )
        self._shared: set[Hashable] = {node for node, num_sessions in users.items() if num_sessions > 1}
        self._rng = random.Random(seed)
        self._numbers = count()

    def __iter__(self) -> Iterator[list[Step]]:
        while True:
            yield self._copy(self._rng.choice(self.recorded), next(self._numbers))

    def starts_s(self, rate: float) -> Iterator[float]:
        """Start times of independent sessions: a Poisson process."""
        now_s = 0.0
        while True:
            now_s += self._rng.expovariate(rate)
            yield now_s

    def mean_ideal_s(self, costs: Costs) -> float:
        """Mean engine time of a session with an unlimited prefix cache, one group at a time."""
        return sum(self._ideal_s(steps, costs) for steps in self.recorded) / len(self.recorded)

    def mean_steps(self) -> float:
        return sum(map(len, self.recorded)) / len(self.recorded)

    def _ideal_s(self, steps: Sequence[Step], costs: Costs) -> float:
        cached, total_s = set(self._shared), 0.0
        for _, path, num_completion_tokens in steps:
            num_cached = sum(num_tokens for node, num_tokens in path if node in cached)
            num_uncached = sum(num_tokens for _, num_tokens in path) - num_cached
            total_s += costs.pass_s([(num_cached, num_uncached, num_completion_tokens)])
            cached.update(node for node, _ in path)
        return total_s

    def _copy(self, steps: Sequence[Step], number: int) -> list[Step]:
        def renamed(node: Hashable) -> Hashable:
            return node if node in self._shared else (number, node)

        return [(at_s, tuple((renamed(n), size) for n, size in path), tokens) for at_s, path, tokens in steps]


def paged_session(number: int, num_steps: int, page_tokens: int, completion_tokens: int) -> list[Step]:
    """A session whose prompts each extend the previous one by a page."""
    nodes: Path = tuple(((number, page), page_tokens) for page in range(num_steps))
    return [(0.0, nodes[: step + 1], completion_tokens) for step in range(num_steps)]


def run_open(cluster: Cluster, sessions: Sessions, rate: float, num_sessions: int) -> None:
    """Open loop: sessions start at a rate, and steps arrive at their recorded times."""
    starts_s = sessions.starts_s(rate)
    for number, (steps, start_s) in enumerate(islice(zip(sessions, starts_s, strict=False), num_sessions)):
        for at_s, path, num_completion_tokens in steps:
            group = Group(path, num_completion_tokens, number)
            cluster.clock.at(start_s + at_s, partial(cluster.score, group))
    cluster.clock.run()


def run_closed(cluster: Cluster, sessions: Sequence[list[Step]], num_at_once: int) -> None:
    """Closed loop: a fixed number of concurrent sessions. Each step arrives when the previous one is done."""
    waiting = iter(enumerate(sessions))

    def next_step(number: int, steps: Iterator[Step]) -> None:
        step = next(steps, None)
        if step is not None:
            cluster.score(Group(*step[1:], number), lambda: next_step(number, steps))
        else:
            next_session()

    def next_session() -> None:
        for number, session in islice(waiting, 1):
            next_step(number, iter(session))

    for _ in range(num_at_once):
        next_session()
    cluster.clock.run()
