"""Attention by fused kernels against loops in fp64."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shopr1_service.engine.attention import fused as fused_module
from shopr1_service.engine.attention import kernels
from shopr1_service.engine.attention.fused import FusedAttention
from shopr1_service.engine.attention.options import AttentionOptions
from shopr1_service.engine.prefix_cache import Segment
from tests.support.attention import (
    HEADS,
    LENGTHS,
    PREFIX_LENGTHS,
    SCALE,
    SOFTCAP,
    WINDOW,
    D,
    check_attention,
    check_nan_stays_in_its_segment,
    check_options,
    chunk,
)


def fused(segments: Sequence[Segment]) -> FusedAttention:
    return FusedAttention(segments, torch.device("cpu"))


@given(lengths=LENGTHS, prefix_lengths=PREFIX_LENGTHS, heads=HEADS, scale=SCALE)
def test_every_token_sees_its_prefix_and_its_segment(
    lengths: list[tuple[int, int]],
    prefix_lengths: list[list[int]],
    heads: tuple[int, int],
    scale: float | None,
) -> None:
    check_attention(fused, lengths, prefix_lengths, heads, scale)


def test_nan_stays_in_its_segment() -> None:
    check_nan_stays_in_its_segment(fused)


@given(
    lengths=LENGTHS,
    prefix_lengths=PREFIX_LENGTHS,
    heads=HEADS,
    window=WINDOW,
    softcap=SOFTCAP,
    has_sinks=st.booleans(),
    block_tokens=st.sampled_from([1, 3, 100]),
    max_scores=st.sampled_from([1, 20, 10**6]),
)
def test_windows_softcaps_and_sinks(
    lengths: list[tuple[int, int]],
    prefix_lengths: list[list[int]],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    block_tokens: int,
    max_scores: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_module, "_NUM_BLOCK_TOKENS", block_tokens)
        patch.setattr(kernels, "_MAX_SCORES", {"cpu": max_scores})
        check_options(fused, lengths, prefix_lengths, heads, window, softcap, has_sinks=has_sinks)


def test_a_window_reads_only_its_own_keys() -> None:
    """Keys before every token's window are not read: NaN there changes nothing."""
    prefix = [chunk(40, 2)]
    segments = [Segment(range(4), prefix) for _ in range(3)]
    query = torch.randn(1, 4, 12, D, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 12, D, dtype=torch.float64)
    options = AttentionOptions(window=10)
    clean = fused(segments)(0, query, key, value, None, options)
    for tensor in (prefix[0].keys[0], prefix[0].values[0]):
        tensor[:, :, :31] = math.nan
    assert torch.equal(fused(segments)(0, query, key, value, None, options), clean)
