"""Attention by matrix products against loops in fp64."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_service.engine.attention import matmul
from shopr1_service.engine.attention.matmul import MatmulAttention
from tests.support.attention import (
    HEADS,
    LENGTHS,
    PREFIX_LENGTHS,
    SCALE,
    SOFTCAP,
    WINDOW,
    check_attention,
    check_nan_stays_in_its_segment,
    check_options,
)


@given(
    lengths=LENGTHS,
    prefix_lengths=PREFIX_LENGTHS,
    heads=HEADS,
    scale=SCALE,
    block_tokens=st.sampled_from([1, 3, 100]),
)
def test_every_token_sees_its_prefix_and_its_segment(
    lengths: list[tuple[int, int]],
    prefix_lengths: list[list[int]],
    heads: tuple[int, int],
    scale: float | None,
    block_tokens: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "MAX_BLOCK_ROWS", 1)
        patch.setattr(matmul, "MIN_BLOCK_TOKENS", block_tokens)
        check_attention(MatmulAttention, lengths, prefix_lengths, heads, scale)


def test_nan_stays_in_its_segment() -> None:
    check_nan_stays_in_its_segment(MatmulAttention)


@given(
    lengths=LENGTHS,
    prefix_lengths=PREFIX_LENGTHS,
    heads=HEADS,
    window=WINDOW,
    softcap=SOFTCAP,
    has_sinks=st.booleans(),
    block_tokens=st.sampled_from([1, 3, 100]),
)
def test_windows_softcaps_and_sinks(
    lengths: list[tuple[int, int]],
    prefix_lengths: list[list[int]],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    block_tokens: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "MAX_BLOCK_ROWS", 1)
        patch.setattr(matmul, "MIN_BLOCK_TOKENS", block_tokens)
        check_options(MatmulAttention, lengths, prefix_lengths, heads, window, softcap, has_sinks=has_sinks)
