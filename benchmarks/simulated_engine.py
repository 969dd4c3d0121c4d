"""One engine as a queue, and what else takes time: parts of the simulation.

An engine takes waiting groups as `RequestQueue` does, by rank and several together, and keeps what it has
computed as `PrefixCache` does. Other processes serve one after another in the order of arrival.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile

from shopr1_service.cluster.prefix_affinity import BLOCK_TOKENS, Work

Path = tuple[tuple[Hashable, int], ...]
"""Nodes of the tree of all prompts, and how many tokens are theirs."""


@dataclass(frozen=True)
class Costs:
    """What things take, in seconds.

    Attributes:
        fixed_s: of a pass of an engine.
        prompt_token_s, own_token_s: of a token of a prompt that is not kept, and of a completion.
        pair_s: of a token that looks at another one, per layer of all.
        proxy_s, ingress_s: CPU time of a request.
        ingress_prompt_token_s, ingress_own_token_s: the same, of a token.
        route_s: of choosing an engine, of each engine there is.
    """

    fixed_s: float = 0.0
    prompt_token_s: float = 0.0
    own_token_s: float = 0.0
    pair_s: float = 0.0
    proxy_s: float = 0.0
    ingress_s: float = 0.0
    ingress_prompt_token_s: float = 0.0
    ingress_own_token_s: float = 0.0
    route_s: float = 0.0

    def pass_s(self, sizes: Sequence[tuple[int, int, int]]) -> float:
        """A pass over groups: tokens that are kept, that are missing, of completions."""
        return self.fixed_s + sum(self._group_s(*size) for size in sizes)

    def front_s(self, group: "Group", num_replicas: int) -> float:
        """The ingress on a group."""
        of_tokens_s = (
            self.ingress_prompt_token_s * group.prompt_tokens + self.ingress_own_token_s * group.own_tokens
        )
        return self.ingress_s + of_tokens_s + self.route_s * num_replicas

    def _group_s(self, num_kept: int, num_missing: int, num_own: int) -> float:
        pairs = num_missing * (num_kept + num_missing / 2) + num_own * (num_kept + num_missing)
        return self.prompt_token_s * num_missing + self.own_token_s * num_own + self.pair_s * pairs


@dataclass(eq=False)
class Group:
    """What is to be scored, and what became of it.

    Attributes:
        session: that it is a step of.
        engine_s: its share of the pass that it was in.
        num_hit: tokens of its prompt that were kept.
    """

    path: Path
    own_tokens: int
    session: int = 0
    arrived_s: float = 0.0
    done_s: float = 0.0
    rank_s: float = 0.0
    engine_s: float = 0.0
    num_hit: int = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.path)

    @property
    def all_tokens(self) -> int:
        return self.prompt_tokens + self.own_tokens

    @property
    def forwarded_tokens(self) -> int:
        return self.all_tokens - self.num_hit

    @property
    def latency_s(self) -> float:
        return self.done_s - self.arrived_s

    def work(self) -> Work:
        """As the router sees it: in blocks. Which node a block ends in says all that comes before it."""
        blocks, end, next_end = list[bytes](), 0, BLOCK_TOKENS
        for node, num_tokens in self.path:
            end += num_tokens
            while next_end <= end:
                blocks.append(repr((node, next_end)).encode())
                next_end += BLOCK_TOKENS
        return Work(tuple(blocks), end, self.own_tokens)


class Clock:
    """What happens when."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), event))

    def run(self) -> None:
        while self._events:
            self.now_s, _, event = heapq.heappop(self._events)
            event()


@dataclass
class Station:
    """Processes that serve in the order of arrival."""

    clock: Clock
    num_free: int
    busy_s: float = 0.0
    _queue: deque[tuple[float, Callable[[], None]]] = field(default_factory=deque)

    def serve(self, duration_s: float, then: Callable[[], None]) -> None:
        self._queue.append((duration_s, then))
        self._begin()

    def _begin(self) -> None:
        if not self.num_free or not self._queue:
            return
        self.num_free -= 1
        duration_s, then = self._queue.popleft()
        self.busy_s += duration_s
        self.clock.at(self.clock.now_s + duration_s, lambda: self._end(then))

    def _end(self, then: Callable[[], None]) -> None:
        self.num_free += 1
        then()
        self._begin()


class Kept:
    """Which nodes an engine keeps: from the ends of paths, those go first that were used longest ago."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._nodes: OrderedDict[Hashable, int] = OrderedDict()

    def num_hit(self, path: Path) -> int:
        return sum(num_tokens for _, num_tokens in takewhile(lambda step: step[0] in self._nodes, path))

    def keep(self, path: Path) -> None:
        for node, num_tokens in reversed(path):
            self._num_tokens += 0 if node in self._nodes else num_tokens
            self._nodes[node] = num_tokens
            self._nodes.move_to_end(node)
        while self._num_tokens > self._max_tokens:
            self._num_tokens -= self._nodes.popitem(last=False)[1]


class Engine:
    """A replica.

    Args:
        max_batch_tokens: of groups that are taken together; 0 takes each alone.
    """

    def __init__(self, clock: Clock, costs: Costs, max_kept_tokens: int, max_batch_tokens: int) -> None:
        self.busy_s = 0.0
        self._clock = clock
        self._costs = costs
        self._kept = Kept(max_kept_tokens)
        self._max_batch_tokens = max_batch_tokens
        self._waiting: list[tuple[float, int, Group, Callable[[], None]]] = []
        self._numbers = count()
        self._is_busy = False
        self._num_tokens = 0

    def serve(self, group: Group, then: Callable[[], None]) -> None:
        # As the scheduler does: when it came, and how long so many tokens have taken so far.
        rate_s = self.busy_s / self._num_tokens if self._num_tokens else 0.0
        group.rank_s = self._clock.now_s + group.all_tokens * rate_s
        heapq.heappush(self._waiting, (group.rank_s, next(self._numbers), group, then))
        self._begin()

    def _begin(self) -> None:
        if self._is_busy or not self._waiting:
            return
        self._is_busy = True
        batch = self._take()
        groups = [group for group, _ in batch]
        for group in groups:
            # Prompts of a batch that begin alike are computed one after the other: the second one hits.
            group.num_hit = self._kept.num_hit(group.path)
            self._kept.keep(group.path)
        sizes = [(g.num_hit, g.prompt_tokens - g.num_hit, g.own_tokens) for g in groups]
        duration_s = self._costs.pass_s(sizes)
        self.busy_s += duration_s
        self._num_tokens += sum(group.all_tokens for group in groups)
        for group in groups:
            group.engine_s = duration_s / len(groups)
        self._clock.at(self._clock.now_s + duration_s, lambda: self._end(batch))

    def _take(self) -> list[tuple[Group, Callable[[], None]]]:
        _, _, group, then = heapq.heappop(self._waiting)
        batch, num_free = [(group, then)], self._max_batch_tokens - group.all_tokens
        left = []
        while self._waiting and num_free > 0:
            item = heapq.heappop(self._waiting)
            if item[2].all_tokens <= num_free:
                batch.append(item[2:])
                num_free -= item[2].all_tokens
            else:
                left.append(item)
        for item in left:
            heapq.heappush(self._waiting, item)
        return batch

    def _end(self, batch: Sequence[tuple[Group, Callable[[], None]]]) -> None:
        self._is_busy = False
        for group, then in batch:
            group.done_s = self._clock.now_s
            then()
        self._begin()
