"""The prefix cache against a list of all prompts that were inserted."""

import gc
import subprocess
import sys
import tracemalloc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shopr1_service.core import TEXT_SCOPE, PromptScope, Version
from shopr1_service.engine.prefix_cache import _TENSOR_BYTES, Chunk, PrefixCache, _below, _Node


def chunk(ids: Sequence[int], start: int = 0) -> Chunk:
    """A chunk whose keys are its tokens and whose values are their positions, to detect mixed-up memory."""
    keys = torch.tensor([[[[float(i), 0.0] for i in ids]]])
    values = torch.tensor([[[[float(p), 0.0] for p in range(start, start + len(ids))]]])
    return Chunk(tuple(ids), (keys,), (values,), torch.tensor([[float(ids[-1])]]))


def remember(cache: PrefixCache, ids: Sequence[int], scope: PromptScope = TEXT_SCOPE) -> None:
    """Compute and insert what is missing, as a forward does."""
    num_known = sum(map(len, cache.match(ids, scope)))
    if num_known < len(ids):
        cache.insert(ids[:num_known], chunk(ids[num_known:], num_known), scope)


def size_of(*prompts: Sequence[int]) -> int:
    """Memory that a cache of these prompts is counted with."""
    cache = PrefixCache(10**9)
    for prompt in prompts:
        remember(cache, prompt)
    return cache.stats.num_bytes


def nodes_of(cache: PrefixCache) -> Iterator[_Node]:
    return (node for root in cache._roots.values() for node in (root, *_below(root)))


def assert_counted(cache: PrefixCache) -> None:
    """Each node is counted as it is now, and nothing else is."""
    assert cache.stats.num_bytes == sum(node.num_bytes for node in nodes_of(cache))


def num_tokens_of(cache: PrefixCache) -> int:
    return sum(len(node.chunk) for node in nodes_of(cache))


def spelled(chunks: Sequence[Chunk]) -> list[int]:
    return [token_id for part in chunks for token_id in part.ids]


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12)


@given(prompts=PROMPTS)
def test_match_finds_the_longest_known_beginning(prompts: list[list[int]]) -> None:
    cache = PrefixCache(10**6)
    known: list[list[int]] = []
    for prompt in prompts:
        chunks = cache.match(prompt)
        longest = max((common_length(prompt, other) for other in known), default=0)
        assert spelled(chunks) == prompt[:longest]
        if chunks:
            assert torch.cat([part.keys[0] for part in chunks], 2)[0, 0, :, 0].tolist() == prompt[:longest]
            positions = torch.cat([part.values[0] for part in chunks], 2)[0, 0, :, 0]
            assert positions.tolist() == list(range(longest))
        remember(cache, prompt)
        known.append(prompt)
    # No token is stored twice.
    beginnings = {tuple(prompt[:end]) for prompt in known for end in range(1, len(prompt) + 1)}
    assert num_tokens_of(cache) == len(beginnings)
    assert_counted(cache)


MAX_BYTES = st.integers(0, 3 * size_of([0, 1]))


@given(prompts=PROMPTS, max_bytes=MAX_BYTES)
def test_the_limit_is_never_exceeded(prompts: list[list[int]], max_bytes: int) -> None:
    cache = PrefixCache(max_bytes)
    for prompt in prompts:
        remember(cache, prompt)
        assert cache.stats.num_bytes <= max_bytes
        assert_counted(cache)
        found = cache.match(prompt)
        assert spelled(found) == prompt[: len(spelled(found))]


def test_the_least_recently_used_chunk_is_evicted_first() -> None:
    cache = PrefixCache(size_of([1, 1], [2, 2]))
    remember(cache, [1, 1])
    remember(cache, [2, 2])
    cache.match([1, 1])
    remember(cache, [3, 3])
    assert [len(spelled(cache.match(ids))) for ids in ([1, 1], [2, 2], [3, 3])] == [2, 0, 2]
    assert cache.stats.num_evicted_chunks == 1


@given(prompts=PROMPTS, max_bytes=MAX_BYTES)
def test_evicted_are_the_ends_that_were_used_least_recently(prompts: list[list[int]], max_bytes: int) -> None:
    cache = PrefixCache(max_bytes)
    last_used: dict[_Node, int] = {}
    for step, prompt in enumerate(prompts):
        known = list(last_used)
        remember(cache, prompt)
        last_used |= {node: step for node, _ in cache._walk(prompt, TEXT_SCOPE)}
        kept = set(nodes_of(cache))
        evicted = [node for node in known if node not in kept]
        ends = [node for node in kept if node in last_used and not node.children]
        assert all(last_used[node] <= last_used[end] for node in evicted for end in ends)
        last_used = {node: used for node, used in last_used.items() if node in kept}
        assert set(cache._order) == {node for node in kept if node.parent}


def test_ends_are_evicted_before_their_beginning() -> None:
    cache = PrefixCache(size_of([1, 2, 3], [1, 2, 4]) + size_of([5, 6]) - size_of([5]))
    remember(cache, [1, 2, 3])
    remember(cache, [1, 2, 4])
    remember(cache, [1, 2, 5, 6])  # too many: the 3 is evicted
    assert spelled(cache.match([1, 2, 3])) == [1, 2]
    assert spelled(cache.match([1, 2, 4])) == [1, 2, 4]
    assert spelled(cache.match([1, 2, 5, 6])) == [1, 2, 5, 6]


def test_the_last_hidden_state_is_that_of_the_last_token() -> None:
    cache = PrefixCache(10**6)
    remember(cache, [1, 2, 3])
    [whole] = cache.match([1, 2, 3, 9])
    assert whole.last_hidden_1_H is not None
    assert whole.last_hidden_1_H.tolist() == [[3.0]]
    [part] = cache.match([1, 2, 9])
    assert part.last_hidden_1_H is None
    remember(cache, [1, 2, 4])  # cuts it in two
    first, second = cache.match([1, 2, 3])
    assert first.last_hidden_1_H is None
    assert second.last_hidden_1_H is not None
    assert second.last_hidden_1_H.tolist() == [[3.0]]


# --- states of recurrent layers ---------------------------------------------------------------------


def remember_states(cache: PrefixCache, ids: Sequence[int]) -> None:
    """Compute what follows the last known states, and insert it. The state is the sum of the tokens."""
    num_known = sum(map(len, cache.match(ids, with_states=True)))
    if num_known < len(ids):
        state = torch.tensor([[float(sum(ids))]])
        new = replace(chunk(ids[num_known:], num_known), states={("recurrent", 0, 0): state})
        cache.insert(ids[:num_known], new)


@given(prompts=PROMPTS)
def test_states_are_found_where_a_prompt_ended(prompts: list[list[int]]) -> None:
    cache = PrefixCache(10**6)
    known: list[list[int]] = []
    for prompt in prompts:
        chunks = cache.match(prompt, with_states=True)
        longest = max((len(other) for other in known if prompt[: len(other)] == other), default=0)
        assert spelled(chunks) == prompt[:longest]
        if chunks:
            assert chunks[-1].states is not None
            assert chunks[-1].last_hidden_1_H is not None
            assert chunks[-1].states["recurrent", 0, 0].item() == sum(prompt[:longest])
            assert chunks[-1].last_hidden_1_H.item() == prompt[longest - 1]
            positions = torch.cat([part.values[0] for part in chunks], 2)[0, 0, :, 0]
            assert positions.tolist() == list(range(longest))
        remember_states(cache, prompt)
        known.append(prompt)
    beginnings = {tuple(prompt[:end]) for prompt in known for end in range(1, len(prompt) + 1)}
    assert num_tokens_of(cache) == len(beginnings)
    assert_counted(cache)


def test_states_are_counted() -> None:
    plain = chunk([1, 2])
    states = {("conv", 0, 0): torch.zeros(1, 8, 4), ("recurrent", 0, 0): torch.zeros(1, 8, 100)}
    more = replace(plain, states=states).num_bytes - plain.num_bytes
    assert more >= 4 * (8 * 4 + 8 * 100) + 2 * _TENSOR_BYTES


# --- chunks that are not added ----------------------------------------------------------------------


def test_a_chunk_without_its_prefix_is_ignored() -> None:
    cache = PrefixCache(10**6)
    cache.insert([1, 2], chunk([3]))
    assert cache.match([1, 2, 3]) == []
    assert cache.stats.num_bytes == 0


def test_a_chunk_whose_prefix_is_cached_elsewhere_is_ignored() -> None:
    """The cache has 1 2 3 inside a chunk, and a 9 only behind the end of the chunk."""
    cache = PrefixCache(10**6)
    remember(cache, [1, 2, 3, 4])
    remember(cache, [1, 2, 3, 4, 9])
    cache.insert([1, 2, 3, 9], chunk([5], 4))
    assert spelled(cache.match([1, 2, 3, 9, 5])) == [1, 2, 3]
    assert spelled(cache.match([1, 2, 3, 4, 9, 5])) == [1, 2, 3, 4, 9]


def test_clear() -> None:
    cache = PrefixCache(10**6)
    remember(cache, [1, 2])
    cache.clear()
    assert (cache.match([1, 2]), cache.stats.num_bytes) == ([], 0)


@pytest.mark.parametrize(("max_bytes", "is_enabled"), [(0, False), (1, True)])
def test_a_limit_below_one_token_keeps_nothing(max_bytes: int, is_enabled: bool) -> None:
    cache = PrefixCache(max_bytes)
    remember(cache, [1, 2])
    assert (cache.is_enabled, cache.match([1, 2])) == (is_enabled, [])


def test_tokens_are_counted() -> None:
    cache = PrefixCache(10**6)
    remember(cache, [1, 2, 3])  # 3 missed
    remember(cache, [1, 2, 4, 5])  # 2 hit, 2 missed
    assert (cache.stats.num_hit_tokens, cache.stats.num_missed_tokens) == (2, 5)


# --- several scopes ---------------------------------------------------------------------------------


def scope_of(number: int | None, inputs: bytes = b"") -> PromptScope:
    return PromptScope(None if number is None else Version(str(number), number, "adapter"), inputs)


SCOPES = st.builds(scope_of, st.sampled_from([None, 1, 2]), st.sampled_from([b"", b"an image", b"another"]))
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["use", "use", "use", "forget", "clear"]),
        SCOPES,
        st.lists(st.integers(0, 2), min_size=1, max_size=6),
    ),
    max_size=20,
)


@given(steps=STEPS)
def test_each_scope_has_entries_of_its_own(steps: list[tuple[str, PromptScope, list[int]]]) -> None:
    cache = PrefixCache(10**6)
    known: dict[PromptScope, set[tuple[int, ...]]] = defaultdict(set)
    for what, scope, prompt in steps:
        if what == "use":
            beginnings = {tuple(prompt[:end]) for end in range(1, len(prompt) + 1)}
            assert len(spelled(cache.match(prompt, scope))) == len(known[scope] & beginnings)
            remember(cache, prompt, scope)
            known[scope] |= beginnings
        elif what == "clear":
            cache.clear()
            known.clear()
        else:
            cache.forget(scope.weights)
            for each in [each for each in known if each.weights == scope.weights]:
                del known[each]
        assert num_tokens_of(cache) == sum(map(len, known.values()))
        assert_counted(cache)


@given(steps=STEPS, max_bytes=MAX_BYTES)
def test_scopes_share_the_limit(steps: list[tuple[str, PromptScope, list[int]]], max_bytes: int) -> None:
    cache = PrefixCache(max_bytes)
    for _, scope, prompt in steps:
        remember(cache, prompt, scope)
        assert cache.stats.num_bytes <= max_bytes
        assert_counted(cache)
        found = spelled(cache.match(prompt, scope))
        assert found == prompt[: len(found)]


def test_the_least_recently_used_is_evicted_from_any_scope() -> None:
    cache = PrefixCache(2 * size_of([1, 1]))
    for scope in (scope_of(None), scope_of(1)):
        remember(cache, [1, 1], scope)
    cache.match([1, 1])
    remember(cache, [2, 2])  # evicts the entry of the other scope
    assert spelled(cache.match([1, 1])) == [1, 1]
    assert cache.match([1, 1], scope_of(1)) == []


def test_an_emptied_scope_leaves_nothing_behind() -> None:
    cache = PrefixCache(size_of([1, 1]))
    for number in range(5):
        remember(cache, [1, 1], scope_of(None, bytes([number])))
    assert len(cache._roots) == 1


def test_a_cleared_cache_can_be_used_at_once() -> None:
    cache = PrefixCache(10**6)
    remember(cache, [1, 2], scope_of(1))
    cache.clear()
    remember(cache, [1, 2, 3], scope_of(1))
    assert spelled(cache.match([1, 2, 3], scope_of(1))) == [1, 2, 3]
    cache.forget(7)  # nothing was computed with it
    assert num_tokens_of(cache) == 3


def test_memory_is_free_as_soon_as_nothing_is_cached() -> None:
    """A pass that ran out of memory is repeated at once: it cannot wait for the garbage collector."""
    gc.disable()
    try:
        for drop in (PrefixCache.clear, lambda cache: cache.forget(None)):
            cache = PrefixCache(10**6)
            for prompt in ([1, 2, 3], [1, 2, 4], [1, 2, 3, 5]):
                remember(cache, prompt)
            tensors = [weakref.ref(key) for node in nodes_of(cache) for key in node.chunk.keys]
            assert len(tensors) == 4
            drop(cache)
            assert [tensor() for tensor in tensors] == [None] * 4
            assert cache.stats.num_bytes == 0
    finally:
        gc.enable()


# --- memory -----------------------------------------------------------------------------------------

NUM_LAYERS = 4


def small_chunk(number: int, num_tokens: int = 12, start: int = 0) -> Chunk:
    """A chunk of a policy with several layers; its ids are no constants of Python."""
    ids = tuple(1000 + number * 10_000 + i for i in range(start, num_tokens))
    tensors = [torch.zeros(1, 2, len(ids), 4) for _ in range(2 * NUM_LAYERS)]
    return Chunk(ids, tuple(tensors[:NUM_LAYERS]), tuple(tensors[NUM_LAYERS:]), torch.zeros(1, 8))


def insert_small(cache: PrefixCache) -> None:
    for number in range(300):
        cache.insert((), small_chunk(number), scope_of(None, str(number % 10).encode()))


def insert_large(cache: PrefixCache) -> None:
    for number in range(5):
        cache.insert((), small_chunk(number, 4000))


def insert_sessions(cache: PrefixCache) -> None:
    """Steps that extend each other, and prompts that leave them midway."""
    for number in range(20):
        for num_tokens in (50, 100, 400):
            ids = small_chunk(number, num_tokens).ids
            known = sum(map(len, cache.match(ids)))
            cache.insert(ids[:known], small_chunk(number, num_tokens, known))
        cache.insert(ids[:70], small_chunk(100 + number, 30))


def insert_too_many(cache: PrefixCache) -> None:
    cache.max_bytes = 2_000_000
    for number in range(500):
        cache.insert((), small_chunk(number, 10 + number % 190))


@pytest.mark.parametrize("insert", [insert_small, insert_large, insert_sessions, insert_too_many])
def test_counted_is_what_is_held(insert: Callable[[PrefixCache], None]) -> None:
    """Storages of tensors, and Python's objects as `tracemalloc` sees them: all but PyTorch's own objects."""
    insert(PrefixCache(10**9))  # some memory is allocated once
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    cache = PrefixCache(10**9)
    insert(cache)
    gc.collect()
    num_python_bytes = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    tensors = [tensor for node in nodes_of(cache) for tensor in tensors_of(node.chunk)]
    num_element_bytes = sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    num_outside = len(tensors) * (_TENSOR_BYTES - sys.getsizeof(torch.zeros(1)))
    held = num_python_bytes + num_element_bytes + num_outside
    assert cache.stats.num_bytes == pytest.approx(held, rel=0.1)


def tensors_of(chunk: Chunk) -> list[Tensor]:
    last = [] if chunk.last_hidden_1_H is None else [chunk.last_hidden_1_H]
    return [*chunk.keys, *chunk.values, *last]


RESIDENT = """
import ctypes, gc, torch
from shopr1_service.engine.prefix_cache import PrefixCache
from tests.service.engine.test_prefix_cache import small_chunk

def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096

small_chunk(0)
cache, before = PrefixCache(10**12), resident()
for number in range(4000):
    cache.insert((), small_chunk(number))
print(cache.stats.num_bytes, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_many_small_prompts_is_counted() -> None:
    """The whole process, PyTorch's objects and the allocator's headers included."""
    printed = subprocess.run(
        [sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True
    ).stdout
    counted, resident = map(int, printed.split())
    assert counted == pytest.approx(resident, rel=0.1)
