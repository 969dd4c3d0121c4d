"""The prefix cache against a list of all prompts that were inserted."""

from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shopr1_service.core import TEXT_SCOPE, PromptScope, Version
from shopr1_service.engine.prefix_cache import Chunk, PrefixCache

BYTES_PER_TOKEN = 2 * 2 * 4  # keys and values, one layer, one head of size 2, fp32


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
    assert cache.stats.num_bytes == BYTES_PER_TOKEN * len(beginnings)


@given(prompts=PROMPTS, max_tokens=st.integers(0, 10))
def test_the_limit_is_never_exceeded(prompts: list[list[int]], max_tokens: int) -> None:
    cache = PrefixCache(max_tokens * BYTES_PER_TOKEN)
    for prompt in prompts:
        remember(cache, prompt)
        assert cache.stats.num_bytes <= max_tokens * BYTES_PER_TOKEN
        found = cache.match(prompt)
        assert spelled(found) == prompt[: len(spelled(found))]


def test_the_least_recently_used_chunk_is_evicted_first() -> None:
    cache = PrefixCache(4 * BYTES_PER_TOKEN)
    remember(cache, [1, 1])
    remember(cache, [2, 2])
    cache.match([1, 1])
    remember(cache, [3, 3])
    assert [len(spelled(cache.match(ids))) for ids in ([1, 1], [2, 2], [3, 3])] == [2, 0, 2]
    assert cache.stats.num_evicted_chunks == 1


def test_ends_are_evicted_before_their_beginning() -> None:
    cache = PrefixCache(5 * BYTES_PER_TOKEN)
    remember(cache, [1, 2, 3])
    remember(cache, [1, 2, 4])  # 1 2 is shared: four tokens in all
    remember(cache, [1, 2, 5, 6])  # one too many: the 3 is evicted
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


def test_a_chunk_without_its_prefix_is_ignored() -> None:
    cache = PrefixCache(10**6)
    cache.insert([1, 2], chunk([3]))
    assert cache.match([1, 2, 3]) == []
    assert cache.stats.num_bytes == 0


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
        assert cache.stats.num_bytes == BYTES_PER_TOKEN * sum(map(len, known.values()))


@given(steps=STEPS, max_tokens=st.integers(0, 8))
def test_scopes_share_the_limit(steps: list[tuple[str, PromptScope, list[int]]], max_tokens: int) -> None:
    cache = PrefixCache(max_tokens * BYTES_PER_TOKEN)
    for _, scope, prompt in steps:
        remember(cache, prompt, scope)
        assert cache.stats.num_bytes <= max_tokens * BYTES_PER_TOKEN
        found = spelled(cache.match(prompt, scope))
        assert found == prompt[: len(found)]


def test_the_least_recently_used_is_evicted_from_any_scope() -> None:
    cache = PrefixCache(4 * BYTES_PER_TOKEN)
    for scope in (scope_of(None), scope_of(1)):
        remember(cache, [1, 1], scope)
    cache.match([1, 1])
    remember(cache, [2, 2])  # evicts the entry of the other scope
    assert spelled(cache.match([1, 1])) == [1, 1]
    assert cache.match([1, 1], scope_of(1)) == []


def test_an_emptied_scope_leaves_nothing_behind() -> None:
    cache = PrefixCache(2 * BYTES_PER_TOKEN)
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
    assert cache.stats.num_bytes == 3 * BYTES_PER_TOKEN
