"""Attention by fused kernels against loops in fp64."""

from collections.abc import Sequence

import torch
from hypothesis import given

from shopr1_service.engine.attention.fused import FusedAttention
from shopr1_service.engine.prefix_cache import Segment
from tests.support.attention import (
    HEADS,
    LENGTHS,
    PREFIX_LENGTHS,
    SCALE,
    check_attention,
    check_nan_stays_in_its_segment,
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
