"""Attention of a rectangle of queries to keys, with its log-sum-exp: PyTorch's fused kernels, or in the open.

    scores = scale · q·k,    out = softmax(scores) · v,    lse = ln Σ exp(scores)

Fused kernels know no softcap: those scores are written out, a block of queries at a time.

Dimensions: S batch, A heads, R queries, W keys, D head size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_MAX_SCORES = {"cpu": 2**21, "cuda": 2**28}
"""Scores that are written out at a time, by device: on a CPU they stay in its caches."""
_ALIGNMENT = 16
"""CUDA's kernel reads masks in pieces: each row must begin at a multiple of so many elements."""


CPU_FLASH, FLASH, EFFICIENT, OPEN = "cpu_flash", "flash", "efficient", "open"
"""Kernels, by name: PyTorch's fused ones, and scores that are written out."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    *,
    is_causal: bool = False,
    mask_R_W: Tensor | None = None,
    softcap: float | None = None,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, in fp32 or wider: [S, A, R, D] and [S, A, R].

    Without a causal mask, query heads that share a key-value head form one longer query (Hydragen, arXiv
    2402.05099): keys and values are not repeated for them.

    Args:
        key, value: [S, K, W, D]; A is a multiple of K.
        is_causal: as many queries as keys, and no query sees later keys.
        mask_R_W: added to the scores, as `banded` makes it. A query that sees no key has a log-sum-exp so low
            that it has no weight beside any other part.
        kernel: where there is neither mask nor softcap; the default is the first of `kernels_of`.
    """
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1 and not is_causal:
        mask_R_W = None if mask_R_W is None else _stacked(mask_R_W, num_groups)
        rows = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
        out, lse = attend(rows, key, value, scale, mask_R_W=mask_R_W, softcap=softcap, kernel=kernel)
        return out.reshape(query.shape), lse.reshape(query.shape[:-1])
    names = kernels_of(query.device, query.dtype)
    kernel = kernel or names[0]
    if kernel == FLASH and mask_R_W is not None:
        kernel = EFFICIENT
    if softcap is not None or kernel == OPEN:
        return _attend_in_the_open(query, key, value, scale, is_causal, mask_R_W, softcap)
    out, lse = _FUSED[kernel](query, key, value, scale, is_causal, mask_R_W)
    return out.to(wide(query.dtype)), lse.to(wide(query.dtype))


def kernels_of(device: torch.device, dtype: torch.dtype) -> Sequence[str]:
    """The kernels for this device and dtype, the fastest first as far as is known."""
    if device.type == "cpu":
        return (CPU_FLASH, OPEN)
    return (FLASH, EFFICIENT, OPEN) if dtype in (torch.float16, torch.bfloat16) else (EFFICIENT, OPEN)


def _cpu_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, is_causal: bool, mask_R_W: Tensor | None
) -> tuple[Tensor, Tensor]:
    mask = None if mask_R_W is None else mask_R_W.expand(*query.shape[:2], -1, -1)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = op(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
    return out, lse


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, is_causal: bool, _mask_R_W: Tensor | None
) -> tuple[Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = op(query, key, value, 0.0, is_causal, scale=scale)
    return out, lse


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, is_causal: bool, mask_R_W: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The only kernel that takes no fewer key-value heads than query heads: they are repeated."""
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1:
        key, value = (tensor.repeat_interleave(num_groups, dim=1) for tensor in (key, value))
    mask = None if mask_R_W is None else mask_R_W.expand(*query.shape[:2], -1, -1)
    op = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, *_ = op(query, key, value, mask, True, 0.0, is_causal, scale=scale)
    return out, lse[..., : query.shape[2]]  # the kernel pads it


_Fused = Callable[
    [Tensor, Tensor, Tensor, float | None, bool, Tensor | None],
    tuple[Tensor, Tensor],
]
_FUSED: dict[str, _Fused] = {CPU_FLASH: _cpu_flash, FLASH: _flash, EFFICIENT: _efficient}


def banded(query_positions_R: Tensor, key_positions_W: Tensor, window: int, like: Tensor) -> Tensor:
    """A mask to add: 0 where a query sees a key of its window, the lowest number elsewhere; [R, W].

    The lowest number, not −∞: a query without any key has finite numbers, which merge with weight 0.
    """
    distance_R_W = query_positions_R[:, None] - key_positions_W[None]
    is_hidden_R_W = (distance_R_W < 0) | (distance_R_W >= window)
    num_queries, num_keys = is_hidden_R_W.shape
    aligned = like.new_zeros(num_queries, -(-num_keys // _ALIGNMENT) * _ALIGNMENT)
    return aligned[:, :num_keys].masked_fill_(is_hidden_R_W, torch.finfo(like.dtype).min)


def _stacked(mask_R_W: Tensor, num_groups: int) -> Tensor:
    """The mask of the rows of several query heads, aligned as the mask of one."""
    aligned = torch.as_strided(mask_R_W, (len(mask_R_W), mask_R_W.stride(0)), (mask_R_W.stride(0), 1))
    return aligned.repeat(num_groups, 1)[:, : mask_R_W.shape[1]]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _attend_in_the_open(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    is_causal: bool,
    mask_R_W: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Scores in fp32 or wider, a block of queries at a time, for all query heads of a key-value head."""
    num_batch, num_kv_heads, num_keys, _ = key.shape
    num_queries, num_dimensions = query.shape[-2:]
    scale = num_dimensions**-0.5 if scale is None else scale
    groups = query.reshape(num_batch, num_kv_heads, -1, num_queries, num_dimensions)
    max_scores = _MAX_SCORES["cpu" if query.device.type == "cpu" else "cuda"]
    num_rows = max(1, max_scores // (query.shape[0] * query.shape[1] * num_keys))
    parts = []
    for start in range(0, num_queries, num_rows):
        end = min(start + num_rows, num_queries)
        num_seen = end if is_causal else num_keys
        block = groups[..., start:end, :]
        scores = (block.flatten(2, 3) @ key[..., :num_seen, :].mT).to(wide(query.dtype))
        scores = scores.view(*block.shape[:-1], num_seen)
        if softcap is None:
            scores.mul_(scale)
        else:
            scores.mul_(scale / softcap).tanh_().mul_(softcap)
        if mask_R_W is not None:
            scores += mask_R_W[start:end]
        if is_causal:
            later = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu(1)
            scores[..., start:].masked_fill_(later, -torch.inf)
        lse = torch.logsumexp(scores, -1)
        weights = scores.sub_(lse[..., None]).exp_().to(value.dtype).flatten(2, 3)
        out = (weights @ value[..., :num_seen, :]).to(lse.dtype)
        parts.append((out.view(*block.shape[:-1], -1).flatten(1, 2), lse.flatten(1, 2)))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, -2), torch.cat(lses, -1)
