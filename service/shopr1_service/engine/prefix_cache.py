"""The prefix cache: keys and values of prompts, kept across requests.

A session's next prompt begins with its last one. A `Chunk` holds the keys and values of consecutive tokens.
The cache is a radix tree of chunks: each path from the root spells the tokens of a prompt, and prompts with
a common beginning share its chunks. Beyond the byte limit, the least recently used ends of paths are
evicted. Counted is what a chunk keeps in memory: keys and values, and also its ids, its node in the tree and
what Python and PyTorch need for each tensor. In a small policy's short prompts that is most of it.

All nodes are in one order, in which each follows the nodes below it: a path that is used moves to the end,
its beginning last. So the first node of the order is the least recently used end, however many there are.

Models with recurrent layers also need the states of these after the last token. They are known where a chunk
ended when it was computed, and for such models a known beginning ends there.

Keys and values depend on more than token ids, on the weights that computed them and on images: each
`PromptScope` has a tree of its own, and all trees share the limit.

Used from the engine's thread only. Dimensions: K key-value heads, T tokens, D head size, H hidden size.
"""

import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from torch import Tensor

from shopr1_service.core import TEXT_SCOPE, CacheStats, PromptScope

_TENSOR_BYTES = 450
"""Memory of a tensor beside its elements: Python's object, PyTorch's, and the allocator's headers."""
_INT_BYTES = 32
_PLACE_BYTES = 90
"""A node's place in the order."""
_SCOPE_BYTES = 400
"""A `PromptScope` with its digest, and its place among the roots."""


States = Mapping[tuple[str, int, int], Tensor]
"""States of recurrent layers by kind, layer and number within the layer, each [1, …]."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Keys and values of consecutive tokens, never written to.

    Attributes:
        ids: the tokens.
        keys, values: per attention layer [1, K, T, D].
        last_hidden_1_H: the last token's hidden state; None if unknown.
        states: of recurrent layers after the last token; None if unknown.
    """

    ids: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    last_hidden_1_H: Tensor | None
    states: States | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_bytes(self) -> int:
        """Memory of a chunk whose tensors are not views."""
        states = self.states or {}
        tensors = [*self.keys, *self.values, *states.values()]
        if self.last_hidden_1_H is not None:
            tensors.append(self.last_hidden_1_H)
        elements = sum(tensor.nbytes for tensor in tensors)
        containers = sum(map(sys.getsizeof, (self, self.ids, self.keys, self.values, *states)))
        return elements + _TENSOR_BYTES * len(tensors) + containers + _INT_BYTES * len(self.ids)

    def view(self, start: int, end: int) -> "Chunk":
        """A view of tokens start … end − 1, on the same memory."""
        return Chunk(
            ids=self.ids[start:end],
            keys=tuple(key[:, :, start:end] for key in self.keys),
            values=tuple(value[:, :, start:end] for value in self.values),
            last_hidden_1_H=self.last_hidden_1_H if end == len(self) else None,
            states=self.states if end == len(self) else None,
        )

    def copy(self) -> "Chunk":
        """A copy on memory of its own, so that the chunk it was cut from can be freed."""
        keys = tuple(key.clone() for key in self.keys)
        values = tuple(value.clone() for value in self.values)
        return Chunk(self.ids, keys, values, self.last_hidden_1_H, self.states)


@dataclass(eq=False, slots=True)
class _Node:
    chunk: Chunk
    parent: "_Node | None"
    scope: PromptScope
    children: dict[int, "_Node"] = field(default_factory=dict)  # by first token
    num_counted_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        own = sys.getsizeof(self) + sys.getsizeof(self.children) + _INT_BYTES
        return own + self.chunk.num_bytes + (_SCOPE_BYTES if self.parent is None else _PLACE_BYTES)


class PrefixCache:
    """A radix tree of chunks, bounded in bytes.

    Args:
        max_bytes: limit of the memory that the cache keeps; 0 disables it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.stats = CacheStats()
        self.max_bytes = max_bytes
        self._roots: dict[PromptScope, _Node] = {}
        self._order: OrderedDict[_Node, None] = OrderedDict()

    @property
    def is_enabled(self) -> bool:
        return self.max_bytes > 0

    def match(
        self, ids: Sequence[int], scope: PromptScope = TEXT_SCOPE, *, with_states: bool = False
    ) -> list[Chunk]:
        """The chunks of the longest cached beginning of `ids`; the last may be a view of a longer chunk.

        Args:
            with_states: the states of recurrent layers must be known at the beginning's end.
        """
        path = list(self._walk(ids, scope))
        if path:
            self._use(path[-1][0])
        chunks = [
            node.chunk if num_tokens == len(node.chunk) else node.chunk.view(0, num_tokens)
            for node, num_tokens in path
        ]
        while with_states and chunks and chunks[-1].states is None:
            chunks.pop()
        num_matched = sum(map(len, chunks))
        self.stats.num_hit_tokens += num_matched
        self.stats.num_missed_tokens += len(ids) - num_matched
        return chunks

    def insert(self, ids: Sequence[int], chunk: Chunk, scope: PromptScope = TEXT_SCOPE) -> None:
        """Add a chunk that follows `ids`, as far as it is new; ignored unless all of `ids` are cached.

        Args:
            chunk: on memory of its own: a view would keep more than is counted.
        """
        if not self.is_enabled or not len(chunk):
            return
        path = list(self._walk((*ids, *chunk.ids), scope))
        num_new = len(ids) + len(chunk) - sum(num_tokens for _, num_tokens in path)
        if num_new > len(chunk):
            return
        node = self._end(*path[-1]) if path else self._roots.setdefault(scope, _root(scope))
        if num_new:
            new = chunk if num_new == len(chunk) else chunk.view(len(chunk) - num_new, len(chunk)).copy()
            child = node.children[new.ids[0]] = _Node(new, node, node.scope)
            self._count(child, node)
            node = child
        elif node.chunk.states is None and chunk.states is not None:
            node.chunk = replace(node.chunk, last_hidden_1_H=chunk.last_hidden_1_H, states=chunk.states)
            self._count(node)
        self._use(node)
        self._evict()

    def reset(self) -> None:
        """Empty the cache and its statistics."""
        self.clear()
        self.stats = CacheStats()

    def clear(self) -> None:
        """Drop all chunks of all weights, as after an update of the policy."""
        for scope in list(self._roots):
            self._drop(scope)

    def forget(self, weights: Hashable) -> None:
        """Drop all chunks of these weights."""
        for scope in [scope for scope in self._roots if scope.weights == weights]:
            self._drop(scope)

    def _drop(self, scope: PromptScope) -> None:
        root = self._roots.pop(scope)
        for node in [root, *_below(root)]:
            self._order.pop(node, None)
            self.stats.num_bytes -= node.num_counted_bytes
            node.children.clear()  # in a cycle with them, its memory would wait for the garbage collector

    def _use(self, node: _Node) -> None:
        """Move a node to the end of the order, and those above it behind it."""
        while node.parent is not None:
            self._order[node] = None
            self._order.move_to_end(node)
            node = node.parent

    def _count(self, *changed: _Node) -> None:
        """Count new nodes, and those whose children or chunk have changed, as they are now."""
        for node in changed:
            num_bytes = node.num_bytes
            self.stats.num_bytes += num_bytes - node.num_counted_bytes
            node.num_counted_bytes = num_bytes

    def _walk(self, ids: Sequence[int], scope: PromptScope) -> Iterator[tuple[_Node, int]]:
        """The nodes along `ids`, each with its number of matching tokens; only the last may match in part."""
        node, position = self._roots.get(scope) or _root(scope), 0
        while position < len(ids) and (child := node.children.get(ids[position])) is not None:
            num_tokens = common_length(child.chunk.ids, ids, position)
            yield child, num_tokens
            if num_tokens < len(child.chunk):
                return
            node, position = child, position + num_tokens

    def _end(self, node: _Node, num_tokens: int) -> _Node:
        """The node that ends after so many tokens of this one."""
        return node if num_tokens == len(node.chunk) else self._split(node, num_tokens)

    def _split(self, node: _Node, num_tokens: int) -> _Node:
        """Cut a node in two; return the first half, whose child is the second."""
        assert node.parent is not None
        head = _Node(node.chunk.view(0, num_tokens).copy(), node.parent, node.scope)
        node.chunk = node.chunk.view(num_tokens, len(node.chunk)).copy()
        node.parent.children[head.chunk.ids[0]] = head
        node.parent = head
        head.children[node.chunk.ids[0]] = node
        self._count(head, node)
        return head

    def _evict(self) -> None:
        while self.stats.num_bytes > self.max_bytes:
            node, _ = self._order.popitem(last=False)
            assert node.parent is not None
            del node.parent.children[node.chunk.ids[0]]
            self.stats.num_bytes -= node.num_counted_bytes
            self.stats.num_evicted_chunks += 1
            if not (node.parent.parent or node.parent.children):
                root = self._roots.pop(node.scope)
                self.stats.num_bytes -= root.num_counted_bytes


def _root(scope: PromptScope) -> _Node:
    return _Node(Chunk((), (), (), None), None, scope)


def _below(root: _Node) -> Iterator[_Node]:
    stack = list(root.children.values())
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())


def common_length(some: Sequence[int], others: Sequence[int], start: int = 0) -> int:
    """The number of first tokens of `some` that equal those of `others` from `start` on."""
    length = min(len(some), len(others) - start)
    if tuple(some[:length]) == tuple(others[start : start + length]):  # most often, and several times as fast
        return length
    return next(i for i in range(length) if some[i] != others[start + i])


@dataclass(frozen=True)
class Segment:
    """Consecutive new tokens of a row, and the chunks of their prefix."""

    ids: Sequence[int]
    prefix: Sequence[Chunk]

    @property
    def num_prefix_tokens(self) -> int:
        return sum(map(len, self.prefix))


def starts_of(segments: Sequence[Segment]) -> list[int]:
    """The start of each segment in a row of them all, and the row's end."""
    return [0, *accumulate(len(segment.ids) for segment in segments)]
