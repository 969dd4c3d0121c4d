"""Attention of a rectangle of queries to keys, with its log-sum-exp: PyTorch's fused kernels, or in the open.

    scores = scale · q·k,    out = softmax(scores) · v,    lse = ln Σ exp(scores)

Fused kernels know no softcap: those scores are written out, a block of queries at a time.

Dimensions: S batch, A heads, R queries, W keys, D head size.
"""

import torch
from torch import Tensor

_MAX_SCORES = {"cpu": 2**21, "cuda": 2**28}
"""Scores that are written out at a time, by device: on a CPU they stay in its caches."""
_ALIGNMENT = 16
"""CUDA's kernel reads masks in pieces: each row must begin at a multiple of so many elements."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    *,
    is_causal: bool = False,
    mask_R_W: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, in fp32 or wider: [S, A, R, D] and [S, A, R].

    Args:
        is_causal: as many queries as keys, and no query sees later keys.
        mask_R_W: added to the scores, as `banded` makes it. A query that sees no key has a log-sum-exp so low
            that it has no weight beside any other part.
    """
    if softcap is not None:
        return _attend_in_the_open(query, key, value, scale, is_causal, mask_R_W, softcap)
    ops, mask = torch.ops.aten, None if mask_R_W is None else mask_R_W.expand(*query.shape[:2], -1, -1)
    if query.device.type == "cpu":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
    elif query.dtype in (torch.float16, torch.bfloat16) and mask is None:
        out, lse, *_ = ops._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
    else:
        out, lse, *_ = ops._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, 0.0, is_causal, scale=scale
        )
        lse = lse[..., : query.shape[2]]  # the kernel pads it
    return out.to(wide(query.dtype)), lse.to(wide(query.dtype))


def banded(query_positions_R: Tensor, key_positions_W: Tensor, window: int, like: Tensor) -> Tensor:
    """A mask to add: 0 where a query sees a key of its window, the lowest number elsewhere; [R, W].

    The lowest number, not −∞: a query without any key has finite numbers, which merge with weight 0.
    """
    distance_R_W = query_positions_R[:, None] - key_positions_W[None]
    is_hidden_R_W = (distance_R_W < 0) | (distance_R_W >= window)
    num_queries, num_keys = is_hidden_R_W.shape
    aligned = like.new_zeros(num_queries, -(-num_keys // _ALIGNMENT) * _ALIGNMENT)
    return aligned[:, :num_keys].masked_fill_(is_hidden_R_W.to(like.device), torch.finfo(like.dtype).min)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _attend_in_the_open(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    is_causal: bool,
    mask_R_W: Tensor | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    num_rows = max(1, _MAX_SCORES[query.device.type] // (query.shape[0] * query.shape[1] * num_keys))
    parts = []
    for start in range(0, num_queries, num_rows):
        end = min(start + num_rows, num_queries)
        num_seen = end if is_causal else num_keys
        scores = (query[..., start:end, :] @ key[..., :num_seen, :].mT).to(wide(query.dtype))
        scores.mul_(scale / softcap).tanh_().mul_(softcap)
        if mask_R_W is not None:
            scores += mask_R_W[start:end]
        if is_causal:
            later = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu(1)
            scores[..., start:].masked_fill_(later, -torch.inf)
        lse = torch.logsumexp(scores, -1)
        weights = scores.sub_(lse[..., None]).exp_()
        parts.append(((weights.to(value.dtype) @ value[..., :num_seen, :]).to(scores.dtype), lse))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, -2), torch.cat(lses, -1)
