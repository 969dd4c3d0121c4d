"""Triton kernels that reduce each token's logits to a few sums, in one pass over the vocabulary.

    z = softcap(scale · (h·w + b)),  d = (z − m) / temperature
    m = max z,   s = Σ exp(d),   a = Σ exp(d)·d,   q = Σ d

`reduce_products` makes the logits itself, a tile at a time; `reduce_logits` reads products that a matrix
product has written. m grows while tiles are added, and the sums so far are then moved to the new maximum
(online softmax, arXiv 1805.02867). The state is fp32. The vocabulary is cut into parts, whose states are
merged outside.

A last tile reaches beyond the vocabulary. Its columns there are no logits of 0: they are left out of every
sum, and m begins at −∞, so that logits far below 0 are not lost.

Importing this module needs `triton`. Dimensions: T tokens and C vocabulary rows of a tile.
"""

import triton
import triton.language as tl

TILE_TOKENS = 128
TILE_ROWS = 128
TILE_HIDDEN = 64
TILE_COLUMNS = 4096
"""Logits of a token that `reduce_logits` reads at a time."""


@triton.jit
def _logits(
    product_T_C, bias, rows_C, is_row_C, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """The logits of products h·w, in the model's order: bias, scale, softcap."""
    z_T_C = product_T_C
    if HAS_BIAS:
        z_T_C += tl.load(bias + rows_C, mask=is_row_C, other=0.0).to(tl.float32)[None, :]
    z_T_C *= scale
    if HAS_SOFTCAP:
        # tanh(x) = 1 − 2 / (exp(2x) + 1), which is ±1 where exp overflows or vanishes.
        z_T_C = softcap * (1 - 2 / (tl.exp(2 * z_T_C / softcap) + 1))
    return z_T_C


@triton.jit
def _with_tile(
    m_T,
    s_T,
    a_T,
    q_T,
    num_logits,
    z_T_C,
    is_row_C,
    temperature,
    WEIGHS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """The state of each token with a further tile.

    Args:
        num_logits: that the state contains.
    """
    is_row_1_C = is_row_C[None, :]
    z_T_C = tl.where(is_row_1_C, z_T_C, float("-inf"))
    max_T = tl.maximum(m_T, tl.max(z_T_C, axis=1))
    # The first tile has nothing to move: −∞ − max would make 0 · ∞ of the empty sums.
    shift_T = tl.where(m_T == float("-inf"), 0.0, (m_T - max_T) / temperature)
    factor_T = tl.exp(shift_T)
    d_T_C = (z_T_C - max_T[:, None]) / temperature
    p_T_C = tl.exp(d_T_C)
    if WEIGHS:
        weighted_T = tl.sum(tl.where(is_row_1_C, p_T_C * d_T_C, 0.0), axis=1)
        a_T = (a_T + s_T * shift_T) * factor_T + weighted_T
    if SUMS:
        q_T = q_T + num_logits * shift_T + tl.sum(tl.where(is_row_1_C, d_T_C, 0.0), axis=1)
    s_T = s_T * factor_T + tl.sum(p_T_C, axis=1)
    return max_T, s_T, a_T, q_T


@triton.jit
def _store(out, place, stride, is_token_T, m_T, s_T, a_T, q_T, WEIGHS: tl.constexpr, SUMS: tl.constexpr):
    tl.store(out + place, m_T, mask=is_token_T)
    tl.store(out + stride + place, s_T, mask=is_token_T)
    if WEIGHS:
        tl.store(out + 2 * stride + place, a_T, mask=is_token_T)
    if SUMS:
        tl.store(out + 3 * stride + place, q_T, mask=is_token_T)


# Sizes that differ from request to request must not compile a kernel of their own.
@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_part_rows"])
def reduce_products(
    hidden,
    weight,
    bias,
    out,
    num_tokens,
    num_rows,
    num_part_rows,
    scale,
    softcap,
    temperature,
    NUM_HIDDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WEIGHS: tl.constexpr,
    SUMS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_HIDDEN: tl.constexpr,
):
    """The state of a tile of tokens over a part of the vocabulary, from hidden states and weights.

    Args:
        hidden, weight: [T, H] and [V, H], contiguous.
        out: [4, parts, T] of m, s, a, q.
        num_part_rows: rows of each part but the last, a multiple of `TILE_ROWS`.
    """
    part = tl.program_id(1)
    tokens_T = tl.program_id(0) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    is_token_T = tokens_T < num_tokens
    m_T = tl.full((TILE_TOKENS,), float("-inf"), tl.float32)
    s_T = tl.zeros((TILE_TOKENS,), tl.float32)
    a_T = tl.zeros((TILE_TOKENS,), tl.float32)
    q_T = tl.zeros((TILE_TOKENS,), tl.float32)
    begin = part * num_part_rows
    for first in range(begin, tl.minimum(begin + num_part_rows, num_rows), TILE_ROWS):
        rows_C = first + tl.arange(0, TILE_ROWS)
        is_row_C = rows_C < num_rows
        product_T_C = tl.zeros((TILE_TOKENS, TILE_ROWS), tl.float32)
        for start in range(0, NUM_HIDDEN, TILE_HIDDEN):
            columns = start + tl.arange(0, TILE_HIDDEN)
            is_column = columns < NUM_HIDDEN
            h = tl.load(
                hidden + tokens_T[:, None].to(tl.int64) * NUM_HIDDEN + columns[None, :],
                mask=is_token_T[:, None] & is_column[None, :],
                other=0.0,
            )
            w = tl.load(
                weight + rows_C[:, None].to(tl.int64) * NUM_HIDDEN + columns[None, :],
                mask=is_row_C[:, None] & is_column[None, :],
                other=0.0,
            )
            # "ieee": fp32 products are not rounded to TF32.
            product_T_C = tl.dot(h, tl.trans(w), product_T_C, input_precision="ieee")
        z_T_C = _logits(product_T_C, bias, rows_C, is_row_C, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        m_T, s_T, a_T, q_T = _with_tile(
            m_T, s_T, a_T, q_T, first - begin, z_T_C, is_row_C, temperature, WEIGHS, SUMS
        )
    stride = tl.num_programs(1) * num_tokens
    _store(out, part * num_tokens + tokens_T, stride, is_token_T, m_T, s_T, a_T, q_T, WEIGHS, SUMS)


@triton.jit(do_not_specialize=["num_tokens", "num_columns", "first_row", "part", "num_parts"])
def reduce_logits(
    products,
    bias,
    out,
    num_tokens,
    num_columns,
    first_row,
    part,
    num_parts,
    scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WEIGHS: tl.constexpr,
    SUMS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """The state of one token over a part of the vocabulary, from products in fp32.

    Args:
        products: h·w of the part, [T, num_columns], contiguous.
        out: [4, num_parts, T] of m, s, a, q.
        first_row: of the part.
    """
    token_T = tl.program_id(0) + tl.arange(0, 1)
    m_T = tl.full((1,), float("-inf"), tl.float32)
    s_T = tl.zeros((1,), tl.float32)
    a_T = tl.zeros((1,), tl.float32)
    q_T = tl.zeros((1,), tl.float32)
    begin = products + tl.program_id(0).to(tl.int64) * num_columns
    for first in range(0, num_columns, TILE_COLUMNS):
        columns_C = first + tl.arange(0, TILE_COLUMNS)
        is_column_C = columns_C < num_columns
        product_T_C = tl.load(begin + columns_C, mask=is_column_C, other=0.0)[None, :]
        rows_C = first_row + columns_C
        z_T_C = _logits(product_T_C, bias, rows_C, is_column_C, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        m_T, s_T, a_T, q_T = _with_tile(
            m_T, s_T, a_T, q_T, first, z_T_C, is_column_C, temperature, WEIGHS, SUMS
        )
    place = part * num_tokens + token_T
    _store(out, place, num_parts * num_tokens, token_T < num_tokens, m_T, s_T, a_T, q_T, WEIGHS, SUMS)
