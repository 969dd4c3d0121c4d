"""Parts of the simulation: a clock, costs, an engine with its queue and prefix cache, other processes.

The engine forms batches as the service's own queue does, by rank and up to a number of tokens. Its prefix
cache evicts the least recently used nodes. Other processes are first-in-first-out queues.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile

from shopr1_service.cluster.prefix_affinity import BLOCK_TOKENS, Work

Path = tuple[tuple[Hashable, int], ...]
"""A prompt as a path in the tree of all prompts: nodes, and the number of tokens of each."""


@dataclass(frozen=True)
class Costs:
    """Durations in seconds.

    Attributes:
        fixed_s: per pass of an engine.
        prompt_token_s: per prompt token that is not cached.
        completion_token_s: per completion token.
        pair_s: per token pair of attention.
        proxy_s: CPU time per request.
        ingress_s: CPU time per request of one group.
        ingress_prompt_token_s, ingress_completion_token_s: CPU time per token.
        route_s: CPU time of a routing decision, per engine.
    """

    fixed_s: float = 0.0
    prompt_token_s: float = 0.0
    completion_token_s: float = 0.0
    pair_s: float = 0.0
    proxy_s: float = 0.0
    ingress_s: float = 0.0
    ingress_prompt_token_s: float = 0.0
    ingress_completion_token_s: float = 0.0
    route_s: float = 0.0

    def pass_s(self, sizes: Sequence[tuple[int, int, int]]) -> float:
        """Duration of a pass. A size is the number of cached, uncached and completion tokens of a group."""
        return self.fixed_s + sum(self._group_s(*size) for size in sizes)

    def ingress_group_s(self, group: "Group", num_replicas: int) -> float:
        """CPU time of the ingress for a group."""
        prompt_s = self.ingress_prompt_token_s * group.prompt_tokens
        completions_s = self.ingress_completion_token_s * group.completion_tokens
        return self.ingress_s + (prompt_s + completions_s) + self.route_s * num_replicas

    def _group_s(self, num_cached: int, num_uncached: int, num_completion: int) -> float:
        pairs = num_uncached * (num_cached + num_uncached / 2) + num_completion * (num_cached + num_uncached)
        tokens_s = self.prompt_token_s * num_uncached + self.completion_token_s * num_completion
        return tokens_s + self.pair_s * pairs


@dataclass(eq=False)
class Group:
    """A group to be scored, and its times.

    Attributes:
        session: number of its session.
        engine_s: its share of the pass that computed it.
        num_hit: prompt tokens found in the prefix cache.
    """

    path: Path
    completion_tokens: int
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
        return self.prompt_tokens + self.completion_tokens

    @property
    def forwarded_tokens(self) -> int:
        return self.all_tokens - self.num_hit

    @property
    def latency_s(self) -> float:
        return self.done_s - self.arrived_s

    def work(self) -> Work:
        """The group as the router sees it, in blocks. The node that a block ends in determines its prefix."""
        blocks, end, next_end = list[bytes](), 0, BLOCK_TOKENS
        for node, num_tokens in self.path:
            end += num_tokens
            while next_end <= end:
                blocks.append(repr((node, next_end)).encode())
                next_end += BLOCK_TOKENS
        return Work(tuple(blocks), end, self.completion_tokens)


class Clock:
    """Queue of future events."""

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
    """Processes that share one first-in-first-out queue."""

    clock: Clock
    num_free: int
    busy_s: float = 0.0
    _queue: deque[tuple[float, Callable[[], None]]] = field(default_factory=deque)

    def serve(self, duration_s: float, on_done: Callable[[], None]) -> None:
        self._queue.append((duration_s, on_done))
        self._start()

    def _start(self) -> None:
        if not self.num_free or not self._queue:
            return
        self.num_free -= 1
        duration_s, on_done = self._queue.popleft()
        self.busy_s += duration_s
        self.clock.at(self.clock.now_s + duration_s, lambda: self._end(on_done))

    def _end(self, on_done: Callable[[], None]) -> None:
        self.num_free += 1
        on_done()
        self._start()


class SimulatedPrefixCache:
    """Nodes in an engine's prefix cache. Evicts the least recently used node, leaves before parents."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._nodes: OrderedDict[Hashable, int] = OrderedDict()

    def num_hit(self, path: Path) -> int:
        return sum(num_tokens for _, num_tokens in takewhile(lambda step: step[0] in self._nodes, path))

    def insert(self, path: Path) -> None:
        for node, num_tokens in reversed(path):
            self._num_tokens += 0 if node in self._nodes else num_tokens
            self._nodes[node] = num_tokens
            self._nodes.move_to_end(node)
        while self._num_tokens > self._max_tokens:
            self._num_tokens -= self._nodes.popitem(last=False)[1]


class Engine:
    """One engine with its queue.

    Args:
        cache_tokens: capacity of the prefix cache.
        max_batch_tokens: of a batch; 0 runs each group alone.
    """

    def __init__(self, clock: Clock, costs: Costs, cache_tokens: int, max_batch_tokens: int) -> None:
        self.busy_s = 0.0
        self._clock = clock
        self._costs = costs
        self._cache = SimulatedPrefixCache(cache_tokens)
        self._max_batch_tokens = max_batch_tokens
        self._waiting: list[tuple[float, int, Group, Callable[[], None]]] = []
        self._numbers = count()
        self._is_busy = False
        self._num_tokens = 0

    def serve(self, group: Group, on_done: Callable[[], None]) -> None:
        # As the scheduler ranks: arrival time, plus the expected duration at the rate so far.
        rate_s = self.busy_s / self._num_tokens if self._num_tokens else 0.0
        group.rank_s = self._clock.now_s + group.all_tokens * rate_s
        heapq.heappush(self._waiting, (group.rank_s, next(self._numbers), group, on_done))
        self._start()

    def _start(self) -> None:
        if self._is_busy or not self._waiting:
            return
        self._is_busy = True
        batch = self._next_batch()
        groups = [group for group, _ in batch]
        for group in groups:
            # Prompts of a batch with a common prefix are computed in turn: the second one hits.
            group.num_hit = self._cache.num_hit(group.path)
            self._cache.insert(group.path)
        sizes = [(g.num_hit, g.prompt_tokens - g.num_hit, g.completion_tokens) for g in groups]
        duration_s = self._costs.pass_s(sizes)
        self.busy_s += duration_s
        self._num_tokens += sum(group.all_tokens for group in groups)
        for group in groups:
            group.engine_s = duration_s / len(groups)
        self._clock.at(self._clock.now_s + duration_s, lambda: self._end(batch))

    def _next_batch(self) -> list[tuple[Group, Callable[[], None]]]:
        _, _, group, on_done = heapq.heappop(self._waiting)
        batch, num_free = [(group, on_done)], self._max_batch_tokens - group.all_tokens
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
        for group, on_done in batch:
            group.done_s = self._clock.now_s
            on_done()
        self._start()
