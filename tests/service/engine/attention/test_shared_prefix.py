"""Both ways to compute attention of packed segments, against softmax(q·k)·v in fp64, written as loops."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from shopr1_service.engine.attention import matmul as written_attention
from shopr1_service.engine.attention.fused import FusedAttention
from shopr1_service.engine.attention.matmul import MatmulAttention
from shopr1_service.engine.attention.shared_prefix import Kernel, choose_kernel
from shopr1_service.engine.prefix_cache import Chunk, Segment

CPU = torch.device("cpu")
NUM_LAYERS = 2
D = 8


def kernel_of(name: str, segments: Sequence[Segment]) -> Kernel:
    return MatmulAttention(segments) if name == "written" else FusedAttention(segments, CPU)


def chunk(num_tokens: int, K: int) -> Chunk:
    def values() -> tuple[Tensor, ...]:
        return tuple(torch.randn(1, K, num_tokens, D, dtype=torch.float64) for _ in range(NUM_LAYERS))

    return Chunk(tuple(range(num_tokens)), values(), values(), None)


def truth(
    segments: Sequence[Segment], layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Token by token and head by head."""
    num_per_key = query.shape[1] // key.shape[1]
    out_1_T_A_D = torch.empty_like(query).transpose(1, 2)
    start = 0
    for segment in segments:
        for t in range(start, start + len(segment.ids)):
            for head in range(query.shape[1]):
                k = head // num_per_key
                seen_keys = [*(c.keys[layer][0, k] for c in segment.prefix), key[0, k, start : t + 1]]
                seen_values = [*(c.values[layer][0, k] for c in segment.prefix), value[0, k, start : t + 1]]
                weights = torch.softmax(scale * torch.cat(seen_keys) @ query[0, head, t], 0)
                out_1_T_A_D[0, t, head] = weights @ torch.cat(seen_values)
        start += len(segment.ids)
    return out_1_T_A_D


@pytest.mark.parametrize("name", ["merged", "written"])
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=5),
    prefix_lengths=st.lists(st.lists(st.integers(1, 6), max_size=2), min_size=3, max_size=3),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    scale=st.sampled_from([None, 0.7]),
    block_tokens=st.sampled_from([1, 3, 100]),
)
def test_every_token_sees_its_prefix_and_its_segment(
    name: str,
    lengths: list[tuple[int, int]],
    prefix_lengths: list[list[int]],
    heads: tuple[int, int],
    scale: float | None,
    block_tokens: int,
) -> None:
    A, K = heads
    prefixes = [[chunk(length, K) for length in chunks] for chunks in prefix_lengths]
    segments = [Segment(range(length), prefixes[i]) for length, i in lengths]
    T = sum(length for length, _ in lengths)
    query = torch.randn(1, A, T, D, dtype=torch.float64)
    key, value = torch.randn(2, 1, K, T, D, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written_attention, "MAX_BLOCK_ROWS", 1)
        patch.setattr(written_attention, "MIN_BLOCK_TOKENS", block_tokens)
        kernel = kernel_of(name, segments)
        for layer in range(NUM_LAYERS):
            actual = kernel(layer, query, key, value, scale)
            expected = truth(segments, layer, query, key, value, scale or 1 / math.sqrt(D))
            assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["merged", "written"])
def test_a_segment_with_nan_touches_no_other(name: str) -> None:
    prefix = [chunk(5, 2)]
    segments = [Segment(range(4), prefix) for _ in range(3)]
    query = torch.randn(1, 4, 12, D, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 12, D, dtype=torch.float64)
    clean = kernel_of(name, segments)(0, query, key, value, None)
    key[:, :, 4], value[:, :, 4] = math.nan, math.nan
    actual = kernel_of(name, segments)(0, query, key, value, None)
    assert torch.equal(actual[:, :4], clean[:, :4])
    assert torch.equal(actual[:, 8:], clean[:, 8:])
    assert actual[:, 4:8].isnan().all()


@pytest.mark.parametrize("has_amx", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [[64], [100, 28], [100, 27], [1] * 9])
def test_long_segments_are_written_out_where_bfloat16_has_no_matrix_units(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool, dtype: torch.dtype, lengths: list[int]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    segments = [Segment(range(length), []) for length in lengths]
    is_written = isinstance(choose_kernel(segments, CPU, dtype), MatmulAttention)
    is_long = lengths in ([64], [100, 28])
    assert is_written == (not has_amx and dtype == torch.bfloat16 and is_long)
