"""A cluster of engines as queues: who waits where, and when everything is done.

A group passes the proxy, then one of the HTTP sides ("ingresses"), which asks its router; then it waits for
an engine. The router is the service's own (`cluster/prefix_affinity.py`): it knows what it was told, and
neither what engines really keep nor what other ingresses have sent.

What is left out: the network, replicas that die, refusals, memory other than that of kept prompts. All of the
HTTP side's work is done before the engine's.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Protocol

from shopr1_service.cluster.prefix_affinity import Work
from shopr1_service.scheduling.request_queue import MAX_BATCH_TOKENS
from simulated_engine import Clock, Costs, Engine, Group, Path, Station
from traces import Request


class Router(Protocol):
    """What `Affinity` and others have in common."""

    def ranked(self, work: Work, replicas: Sequence[int]) -> list[int]: ...

    def begin(self, key: Hashable, work: Work, replica: int) -> None: ...

    def end(self, key: Hashable) -> None: ...


class RoundRobin:
    """One replica after the other."""

    def __init__(self) -> None:
        self._turns = count()

    def ranked(self, work: Work, replicas: Sequence[int]) -> list[int]:
        return [replicas[next(self._turns) % len(replicas)]]

    def begin(self, key: Hashable, work: Work, replica: int) -> None:
        """It knows nothing."""

    def end(self, key: Hashable) -> None:
        """It knows nothing."""


@dataclass(frozen=True)
class Size:
    """How many of each there are, and what one engine can do.

    Attributes:
        by_session: the groups of a session all pass the same ingress. Else ingresses take turns.
        max_kept_tokens: of prompts, in an engine.
        max_batch_tokens: of groups that it takes together; 0 takes each alone.
    """

    num_replicas: int
    num_ingresses: int = 1
    num_proxies: int = 1
    by_session: bool = False
    max_kept_tokens: int = 10**9
    max_batch_tokens: int = MAX_BATCH_TOKENS


class Cluster:
    """See the module."""

    def __init__(self, size: Size, costs: Costs, make_router: Callable[[], Router]) -> None:
        self.clock = Clock()
        self.done: list[Group] = []
        self.engines = [
            Engine(self.clock, costs, size.max_kept_tokens, size.max_batch_tokens)
            for _ in range(size.num_replicas)
        ]
        self.proxy = Station(self.clock, size.num_proxies)
        self.ingresses = [Station(self.clock, 1) for _ in range(size.num_ingresses)]
        self._costs = costs
        self._by_session = size.by_session
        self._routers = [make_router() for _ in self.ingresses]
        # Each ingress begins elsewhere: else those that go round would go in step.
        self._replicas = [
            [*range(start, size.num_replicas), *range(start)]
            for start in (i * size.num_replicas // size.num_ingresses for i in range(size.num_ingresses))
        ]
        self._turns = count()

    def score(self, group: Group, then: Callable[[], None] = lambda: None) -> None:
        """A group comes now. `then` is called when it is done."""
        group.arrived_s = self.clock.now_s
        self.proxy.serve(self._costs.proxy_s, lambda: self._enter(group, then))

    def _enter(self, group: Group, then: Callable[[], None]) -> None:
        number = (group.session if self._by_session else next(self._turns)) % len(self.ingresses)
        duration_s = self._costs.front_s(group, len(self.engines))
        self.ingresses[number].serve(duration_s, lambda: self._route(number, group, then))

    def _route(self, number: int, group: Group, then: Callable[[], None]) -> None:
        router, work = self._routers[number], group.work()
        chosen = router.ranked(work, self._replicas[number])[0]
        router.begin(group, work, chosen)
        self.engines[chosen].serve(group, lambda: self._end(router, group, then))

    def _end(self, router: Router, group: Group, then: Callable[[], None]) -> None:
        router.end(group)
        self.done.append(group)
        then()


# --- what comes -------------------------------------------------------------------------------------

Step = tuple[float, Path, int]
"""Seconds since the session began, the prompt, tokens of completions."""


class Sessions:
    """Copies of the sessions of a trace, drawn at random.

    Copies have in common what sessions of the trace have in common, as the shop's first page; the rest of
    each is its own.
    """

    def __init__(self, trace: Sequence[Request], seed: int) -> None:
        by_session = defaultdict[int, list[Request]](list)
        for request in trace:
            by_session[request.session].append(request)
        self.recorded = [
            [(r.at_s - rs[0].at_s, r.path, r.own_tokens) for r in rs] for rs in by_session.values()
        ]
        users = Counter(
            node for steps in self.recorded for node in {n for _, path, _ in steps for n, _ in path}
        )
        self._public: set[Hashable] = {node for node, num_sessions in users.items() if num_sessions > 1}
        self._chance = random.Random(seed)
        self._numbers = count()

    def __iter__(self) -> Iterator[list[Step]]:
        while True:
            yield self._copy(self._chance.choice(self.recorded), next(self._numbers))

    def starts_s(self, rate: float) -> Iterator[float]:
        """When sessions begin that know nothing of each other: a Poisson process."""
        now_s = 0.0
        while True:
            now_s += self._chance.expovariate(rate)
            yield now_s

    def mean_ideal_s(self, costs: Costs) -> float:
        """What a session takes an engine that keeps all it ever had, one group at a time."""
        return sum(self._ideal_s(steps, costs) for steps in self.recorded) / len(self.recorded)

    def mean_steps(self) -> float:
        return sum(map(len, self.recorded)) / len(self.recorded)

    def _ideal_s(self, steps: Sequence[Step], costs: Costs) -> float:
        known, total_s = set(self._public), 0.0
        for _, path, num_own in steps:
            num_kept = sum(num_tokens for node, num_tokens in path if node in known)
            num_missing = sum(num_tokens for _, num_tokens in path) - num_kept
            total_s += costs.pass_s([(num_kept, num_missing, num_own)])
            known.update(node for node, _ in path)
        return total_s

    def _copy(self, steps: Sequence[Step], number: int) -> list[Step]:
        def own(node: Hashable) -> Hashable:
            return node if node in self._public else (number, node)

        return [(at_s, tuple((own(n), size) for n, size in path), num_own) for at_s, path, num_own in steps]


def paged_session(number: int, num_steps: int, page_tokens: int, own_tokens: int) -> list[Step]:
    """A session each of whose prompts has a page more than the last one."""
    nodes: Path = tuple(((number, page), page_tokens) for page in range(num_steps))
    return [(0.0, nodes[: step + 1], own_tokens) for step in range(num_steps)]


def run_open(cluster: Cluster, sessions: Sessions, rate: float, num_sessions: int) -> None:
    """Sessions begin at a rate, whatever the cluster does; their steps come as they were recorded."""
    starts_s = sessions.starts_s(rate)
    for number, (steps, start_s) in enumerate(islice(zip(sessions, starts_s, strict=False), num_sessions)):
        for at_s, path, num_own in steps:
            group = Group(path, num_own, number)
            cluster.clock.at(start_s + at_s, partial(cluster.score, group))
    cluster.clock.run()


def run_closed(cluster: Cluster, sessions: Sequence[list[Step]], num_at_once: int) -> None:
    """So many sessions go on at a time; each step comes when the one before is answered."""
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
