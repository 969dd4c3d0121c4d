"""Ways to reduce the logits of a linear head on CUDA: how the kernels of `kernels.py` are run.

Importing this module needs `triton`. Dimensions: T tokens, H hidden size, N parts of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from shopr1_rewards.self_certainty import LogitSums
from shopr1_service.engine.fused_head import kernels
from shopr1_service.engine.lm_head import CUDA_CHUNK_ROWS, LinearHead, matmul_exact

NUM_PROGRAMS = 512
"""Programs of a launch, about: several for each multiprocessor of any device."""


def written_products(
    head: LinearHead, hidden_T_H: Tensor, num_rows: int, temperature: float, weighs: bool, sums: bool
) -> LogitSums:
    """Products by the library's matrix product, a chunk at a time; each chunk is read once."""
    num_tokens = hidden_T_H.shape[0]
    num_parts = -(-num_rows // CUDA_CHUNK_ROWS)
    out_4_N_T = _state(hidden_T_H, num_parts)
    for part, first in enumerate(range(0, num_rows, CUDA_CHUNK_ROWS)):
        weight_C_H = head.weight_V_H[first : min(first + CUDA_CHUNK_ROWS, num_rows)]
        kernels.reduce_logits[(num_tokens,)](
            matmul_exact(hidden_T_H, weight_C_H),
            *(_bias(head), out_4_N_T, num_tokens, len(weight_C_H), first, part, num_parts),
            *_transform(head, temperature),
            **_flags(head, weighs, sums),
            TILE_COLUMNS=kernels.TILE_COLUMNS,
            num_warps=8,
        )
    return _merged(out_4_N_T, CUDA_CHUNK_ROWS, num_rows, temperature, weighs, sums)


def fused_products(
    head: LinearHead, hidden_T_H: Tensor, num_rows: int, temperature: float, weighs: bool, sums: bool
) -> LogitSums:
    """Products and sums in one kernel: no logit is written to memory."""
    num_tokens, num_hidden = hidden_T_H.shape
    num_token_tiles = -(-num_tokens // kernels.TILE_TOKENS)
    num_row_tiles = -(-num_rows // kernels.TILE_ROWS)
    num_part_rows = kernels.TILE_ROWS * -(-num_row_tiles * num_token_tiles // NUM_PROGRAMS)
    num_parts = -(-num_rows // num_part_rows)
    out_4_N_T = _state(hidden_T_H, num_parts)
    kernels.reduce_products[(num_token_tiles, num_parts)](
        *(hidden_T_H.contiguous(), head.weight_V_H.contiguous(), _bias(head), out_4_N_T),
        *(num_tokens, num_rows, num_part_rows),
        *_transform(head, temperature),
        NUM_HIDDEN=num_hidden,
        **_flags(head, weighs, sums),
        TILE_TOKENS=kernels.TILE_TOKENS,
        TILE_ROWS=kernels.TILE_ROWS,
        TILE_HIDDEN=kernels.TILE_HIDDEN,
        num_warps=8,
        num_stages=3,
    )
    return _merged(out_4_N_T, num_part_rows, num_rows, temperature, weighs, sums)


def _state(like: Tensor, num_parts: int) -> Tensor:
    """m, s, a and q of each part and token, not set yet."""
    return torch.empty((4, num_parts, like.shape[0]), dtype=torch.float32, device=like.device)


def _bias(head: LinearHead) -> Tensor:
    return head.weight_V_H if head.bias_V is None else head.bias_V  # a pointer that is not read


def _transform(head: LinearHead, temperature: float) -> tuple[float, float, float]:
    return float(head.scale), float(head.softcap or 1.0), float(temperature)


def _flags(head: LinearHead, weighs: bool, sums: bool) -> dict[str, Any]:
    return {
        "HAS_BIAS": head.bias_V is not None,
        "HAS_SOFTCAP": head.softcap is not None,
        "WEIGHS": weighs,
        "SUMS": sums,
    }


def _merged(
    out_4_N_T: Tensor, num_part_rows: int, num_rows: int, temperature: float, weighs: bool, sums: bool
) -> LogitSums:
    """The state of each token over all parts, in fp64: sums relative to the largest maximum."""
    max_N_T, exp_sum_N_T, weighted_N_T, sum_N_T = out_4_N_T.double()
    max_N_T = max_N_T / temperature
    max_T = max_N_T.amax(dim=0)
    shift_N_T = max_N_T - max_T
    scale_N_T = shift_N_T.exp()
    begins_N = torch.arange(0, num_rows, num_part_rows, device=max_T.device)
    num_logits_N_1 = (num_rows - begins_N).clamp_max(num_part_rows)[:, None]
    return LogitSums(
        max_T=max_T,
        exp_sum_T=(exp_sum_N_T * scale_N_T).sum(dim=0),
        exp_weighted_sum_T=((weighted_N_T + exp_sum_N_T * shift_N_T) * scale_N_T).sum(dim=0)
        if weighs
        else None,
        sum_T=(sum_N_T + num_logits_N_1 * shift_N_T).sum(dim=0) if sums else None,
        num_logits=num_rows,
    )
