"""Attention of packed segments as loops over softmax(q·k)·v in fp64, and checks of an implementation."""

import math
from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from shopr1_service.engine.attention.options import PLAIN, AttentionOptions
from shopr1_service.engine.attention.shared_prefix import Kernel
from shopr1_service.engine.prefix_cache import Chunk, Segment

NUM_LAYERS = 2
D = 8

KernelOf = Callable[[Sequence[Segment]], Kernel]

# For `hypothesis.given`: segments and prefixes of several lengths, heads that are shared or not, a scale.
LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=5)
PREFIX_LENGTHS = st.lists(st.lists(st.integers(1, 6), max_size=2), min_size=3, max_size=3)
HEADS = st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)])
SCALE = st.sampled_from([None, 0.7])
WINDOW = st.sampled_from([None, 1, 2, 3, 5, 8, 13])
SOFTCAP = st.sampled_from([None, 1.5])


def chunk(num_tokens: int, K: int) -> Chunk:
    def values() -> tuple[Tensor, ...]:
        return tuple(torch.randn(1, K, num_tokens, D, dtype=torch.float64) for _ in range(NUM_LAYERS))

    return Chunk(tuple(range(num_tokens)), values(), values(), None)


def truth(
    segments: Sequence[Segment],
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """Attention, token by token and head by head. A sink is a score whose value is 0."""
    num_per_key = query.shape[1] // key.shape[1]
    out_1_T_A_D = torch.empty_like(query).transpose(1, 2)
    start = 0
    for segment in segments:
        for t in range(start, start + len(segment.ids)):
            for head in range(query.shape[1]):
                k = head // num_per_key
                seen_keys = [*(c.keys[layer][0, k] for c in segment.prefix), key[0, k, start : t + 1]]
                seen_values = [*(c.values[layer][0, k] for c in segment.prefix), value[0, k, start : t + 1]]
                last = len(torch.cat(seen_keys))
                window = slice(max(0, last - (options.window or last)), last)
                scores = scale * torch.cat(seen_keys)[window] @ query[0, head, t]
                if options.softcap is not None:
                    scores = options.softcap * torch.tanh(scores / options.softcap)
                if options.sinks_A is not None:
                    scores = torch.cat([scores, options.sinks_A[head : head + 1]])
                weights = torch.softmax(scores, 0)[: len(torch.cat(seen_keys)[window])]
                out_1_T_A_D[0, t, head] = weights @ torch.cat(seen_values)[window]
        start += len(segment.ids)
    return out_1_T_A_D


def check_attention(
    kernel_of: KernelOf,
    lengths: list[tuple[int, int]],
    prefix_lengths: list[list[int]],
    heads: tuple[int, int],
    scale: float | None,
    options: AttentionOptions = PLAIN,
) -> None:
    """Every token sees its prefix and, causally, its segment.

    Args:
        lengths: of each segment, the tokens and the index of its prefix.
        prefix_lengths: of each prefix, the tokens of its chunks.
        heads: query heads and key-value heads.
    """
    A, K = heads
    prefixes = [[chunk(length, K) for length in chunks] for chunks in prefix_lengths]
    segments = [Segment(range(length), prefixes[i]) for length, i in lengths]
    T = sum(length for length, _ in lengths)
    query = torch.randn(1, A, T, D, dtype=torch.float64)
    key, value = torch.randn(2, 1, K, T, D, dtype=torch.float64)
    kernel = kernel_of(segments)
    for layer in range(NUM_LAYERS):
        actual = kernel(layer, query, key, value, scale, options)
        expected = truth(segments, layer, query, key, value, scale or 1 / math.sqrt(D), options)
        assert_close(actual, expected, rtol=0, atol=1e-12)


def check_options(
    kernel_of: KernelOf,
    lengths: list[tuple[int, int]],
    prefix_lengths: list[list[int]],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    *,
    has_sinks: bool,
) -> None:
    """As `check_attention`, with a window, a softcap and sinks."""
    sinks_A = torch.randn(heads[0], dtype=torch.float64) if has_sinks else None
    options = AttentionOptions(window, softcap, sinks_A)
    check_attention(kernel_of, lengths, prefix_lengths, heads, None, options)


def check_nan_stays_in_its_segment(kernel_of: KernelOf) -> None:
    """A segment with NaN does not change the bits of the others."""
    prefix = [chunk(5, 2)]
    segments = [Segment(range(4), prefix) for _ in range(3)]
    query = torch.randn(1, 4, 12, D, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 12, D, dtype=torch.float64)
    clean = kernel_of(segments)(0, query, key, value, None, PLAIN)
    key[:, :, 4], value[:, :, 4] = math.nan, math.nan
    actual = kernel_of(segments)(0, query, key, value, None, PLAIN)
    assert torch.equal(actual[:, :4], clean[:, :4])
    assert torch.equal(actual[:, 8:], clean[:, 8:])
    assert actual[:, 4:8].isnan().all()
