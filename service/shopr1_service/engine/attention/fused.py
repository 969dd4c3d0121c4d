"""Attention by PyTorch's fused kernels: to a prefix and to the own segment, merged by log-sum-exp.

    out = Σ_i exp(lse_i − lse) · out_i,    lse = ln Σ_i exp(lse_i)

The merge is exact. A prefix is read once for all consecutive segments that share it. It is never copied,
and no mask is built. In the prefix part, query heads that share a key-value head form one longer query
(Hydragen, arXiv 2402.05099).

Dimensions: A query heads, K key-value heads, T tokens of the row, D head size, S segments, R longest segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shopr1_service.engine.prefix_cache import Chunk, Segment, starts_of


@dataclass(frozen=True)
class _Bucket:
    """Segments of similar length, padded at the end to a rectangle.

    Attributes:
        tokens_S_R: index in the row of each token; padding repeats the segment's last token.
        tokens_N: indices in the row of the bucket's real tokens.
        cells_N: indices of these in the flattened rectangle.
    """

    tokens_S_R: Tensor
    tokens_N: Tensor
    cells_N: Tensor


@dataclass(frozen=True)
class _Share:
    """Consecutive tokens of the row that have the same prefix."""

    start: int
    end: int
    chunks: Sequence[Chunk]


class FusedAttention:
    """The attention of one row of segments."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        starts = starts_of(segments)
        self._buckets = _buckets(segments, starts, device)
        self._shares = _shares(segments, starts)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of queries [1, A, T, D] to keys and values [1, K, T, D]; returns [1, T, A, D]."""
        out, lse = self._own_part(query, key, value, scale)
        for share in self._shares:
            _add_prefix_part(share, layer, query, out, lse, scale)
        return out.to(query.dtype).transpose(1, 2).contiguous()

    def _own_part(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Causal attention within each segment: [1, A, T, D], widened, and its log-sum-exp [1, A, T]."""
        num_groups = query.shape[1] // key.shape[1]
        if len(self._buckets) == 1 and len(self._buckets[0].tokens_S_R) == 1:
            return _attend(query, _repeat(key, num_groups), _repeat(value, num_groups), scale, is_causal=True)
        out_A_T_D = torch.empty_like(query[0], dtype=_wide(query.dtype))
        lse_A_T = out_A_T_D.new_empty(out_A_T_D.shape[:2])
        for bucket in self._buckets:
            rows = [tensor[0, :, bucket.tokens_S_R].transpose(0, 1) for tensor in (query, key, value)]
            query_S, key_S, value_S = rows[0], _repeat(rows[1], num_groups), _repeat(rows[2], num_groups)
            out_S_A_R_D, lse_S_A_R = _attend(query_S, key_S, value_S, scale, is_causal=True)
            out_A_T_D[:, bucket.tokens_N] = out_S_A_R_D.transpose(0, 1).flatten(1, 2)[:, bucket.cells_N]
            lse_A_T[:, bucket.tokens_N] = lse_S_A_R.transpose(0, 1).flatten(1, 2)[:, bucket.cells_N]
        return out_A_T_D[None], lse_A_T[None]


def _buckets(segments: Sequence[Segment], starts: Sequence[int], device: torch.device) -> list[_Bucket]:
    """Group segments by the power of two above their length: at most half of a rectangle is padding."""
    members: dict[int, list[int]] = {}
    for i, segment in enumerate(segments):
        members.setdefault(len(segment.ids).bit_length(), []).append(i)
    return [_bucket([(starts[i], len(segments[i].ids)) for i in group], device) for group in members.values()]


def _bucket(places: Sequence[tuple[int, int]], device: torch.device) -> _Bucket:
    starts_S = torch.tensor([start for start, _ in places])
    lengths_S = torch.tensor([length for _, length in places])
    steps_R = torch.arange(int(lengths_S.max()))
    tokens_S_R = starts_S[:, None] + torch.minimum(steps_R[None], lengths_S[:, None] - 1)
    is_real_S_R = steps_R[None] < lengths_S[:, None]
    cells_N = is_real_S_R.flatten().nonzero()[:, 0]
    tokens_N = tokens_S_R.flatten()[cells_N]
    return _Bucket(tokens_S_R.to(device), tokens_N.to(device), cells_N.to(device))


def _shares(segments: Sequence[Segment], starts: Sequence[int]) -> list[_Share]:
    shares: list[_Share] = []
    for i, segment in enumerate(segments):
        if shares and shares[-1].chunks is segment.prefix:
            shares[-1] = _Share(shares[-1].start, starts[i + 1], segment.prefix)
        else:
            shares.append(_Share(starts[i], starts[i + 1], segment.prefix))
    return [share for share in shares if share.chunks]


def _add_prefix_part(
    share: _Share, layer: int, query: Tensor, out: Tensor, lse: Tensor, scale: float | None
) -> None:
    """Merge attention to a prefix into `out` and `lse`, in place."""
    place = slice(share.start, share.end)
    for chunk in share.chunks:
        key, value = chunk.keys[layer], chunk.values[layer]
        num_kv_heads = key.shape[1]
        query_1_K_N_D = query[:, :, place].reshape(1, num_kv_heads, -1, query.shape[-1])
        out_1_K_N_D, lse_1_K_N = _attend(query_1_K_N_D, key, value, scale, is_causal=False)
        prefix_out = out_1_K_N_D.reshape(1, query.shape[1], -1, query.shape[-1])
        prefix_lse = lse_1_K_N.reshape(1, query.shape[1], -1)
        own_lse = lse[:, :, place]
        # exp(lse_prefix − lse_both) is a sigmoid of the difference, which cannot overflow.
        weight = torch.sigmoid(prefix_lse - own_lse)[..., None]
        out[:, :, place] = torch.lerp(out[:, :, place], prefix_out, weight)
        lse[:, :, place] = torch.logaddexp(own_lse, prefix_lse)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Fused attention and its log-sum-exp, in fp32 or wider."""
    ops = torch.ops.aten
    if query.device.type == "cpu":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, scale=scale
        )
    elif query.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = ops._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
    else:
        out, lse, *_ = ops._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, is_causal, scale=scale
        )
        lse = lse[..., : query.shape[2]]  # the kernel pads it
    wide = _wide(query.dtype)
    return out.to(wide), lse.to(wide)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _repeat(tensor_S_K_T_D: Tensor, num_groups: int) -> Tensor:
    """Key-value heads repeated for the query heads that share them."""
    return tensor_S_K_T_D if num_groups == 1 else tensor_S_K_T_D.repeat_interleave(num_groups, dim=1)
