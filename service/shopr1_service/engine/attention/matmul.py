"""Attention by matrix products: scores = scale · q·k, softmax, weights · v, in blocks of queries.

For CPUs whose matrix products are faster than PyTorch's fused attention. Query heads that share a key-value
head are rows of one matrix, so that its keys are read once for all of them. One softmax covers prefix and
own segment: nothing is merged. A block's scores fit in the CPU's cache.

Segments are computed separately: a weight of 0 times a value of NaN would be NaN.

Dimensions: A query heads, K key-value heads, G = A / K query heads that share one, D head size, T tokens of
the row, N rows of a block (its tokens' G query heads, token after token), W keys that a block sees.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shopr1_service.engine.attention.kernels import wide
from shopr1_service.engine.attention.options import PLAIN, AttentionOptions
from shopr1_service.engine.prefix_cache import Segment, starts_of

MAX_BLOCK_ROWS = 384
"""Rows of one product. More use the cores better; fewer waste less above the diagonal and fit the cache."""
MIN_BLOCK_TOKENS = 32


class MatmulAttention:
    """The attention of one row of segments."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._starts = starts_of(segments)
        self._scores = torch.empty(0)
        self._mask = torch.empty(0)

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        options: AttentionOptions = PLAIN,
    ) -> Tensor:
        """Attention of queries [1, A, T, D] to keys and values [1, K, T, D]; returns [1, T, A, D]."""
        num_heads, _, head_size = key.shape[1:]
        scale = head_size**-0.5 if scale is None else scale
        queries_K_T_G_D = query[0].reshape(num_heads, -1, *query.shape[2:]).transpose(1, 2).contiguous()
        out_K_T_G_D = torch.empty_like(queries_K_T_G_D)
        for segment, start, end in zip(self._segments, self._starts, self._starts[1:], strict=False):
            keys = [*(chunk.keys[layer][0] for chunk in segment.prefix), key[0, :, start:end]]
            values = [*(chunk.values[layer][0] for chunk in segment.prefix), value[0, :, start:end]]
            own = slice(start, end)
            self._attend(
                *(queries_K_T_G_D[:, own], torch.cat(keys, 1), torch.cat(values, 1), scale),
                options,
                out_K_T_G_D[:, own],
            )
        return out_K_T_G_D.transpose(0, 1).flatten(1, 2)[None]

    def _attend(
        self,
        queries_K_T_G_D: Tensor,
        keys_K_W_D: Tensor,
        values_K_W_D: Tensor,
        scale: float,
        options: AttentionOptions,
        out: Tensor,
    ) -> None:
        """Attention of one segment to its prefix and itself, written to `out`."""
        num_heads, num_tokens, G, head_size = queries_K_T_G_D.shape
        num_prefix_tokens = keys_K_W_D.shape[1] - num_tokens
        num_block_tokens = max(MIN_BLOCK_TOKENS, MAX_BLOCK_ROWS // G)
        for start in range(0, num_tokens, num_block_tokens):
            end = min(start + num_block_tokens, num_tokens)
            first = 0 if options.window is None else max(0, num_prefix_tokens + start - options.window + 1)
            seen = slice(first, num_prefix_tokens + end)
            scores_N_W = self._scores_buffer(queries_K_T_G_D, (end - start) * G, seen.stop - first)
            above_N_T = self._above_diagonal(queries_K_T_G_D, end - start)
            for head in range(num_heads):
                rows_N_D = queries_K_T_G_D[head, start:end].view(-1, head_size)
                keys_D_W = keys_K_W_D[head, seen].T
                torch.addmm(scores_N_W, rows_N_D, keys_D_W, beta=0, alpha=scale, out=scores_N_W)
                if options.softcap is not None:
                    scores_N_W.div_(options.softcap).tanh_().mul_(options.softcap)
                scores_N_W[:, num_prefix_tokens + start - first :] += above_N_T
                if options.window is not None:
                    _hide_before(scores_N_W, G, num_prefix_tokens + start - options.window + 1 - first)
                result = out[head, start:end].view(-1, head_size)
                _weigh(scores_N_W, values_K_W_D[head, seen], _sinks_of(options, head, end - start, G), result)

    def _scores_buffer(self, like: Tensor, num_rows: int, num_columns: int) -> Tensor:
        """A buffer for scores, reused from layer to layer: new memory costs a page fault every 4 KiB."""
        num_scores = num_rows * num_columns
        if self._scores.numel() < num_scores:
            self._scores = like.new_empty(num_scores)
        return self._scores[:num_scores].view(num_rows, num_columns)

    def _above_diagonal(self, queries_K_T_G_D: Tensor, num_tokens: int) -> Tensor:
        """A reused mask: −inf where a row would see tokens after its own, else 0."""
        G = queries_K_T_G_D.shape[2]
        if len(self._mask) != num_tokens * G:
            square_T_T = queries_K_T_G_D.new_full((num_tokens, num_tokens), -torch.inf).triu(1)
            self._mask = square_T_T.repeat_interleave(G, 0)
        return self._mask


def _hide_before(scores_N_W: Tensor, num_rows: int, num_hidden: int) -> None:
    """Hide the keys before each token's window.

    Args:
        num_rows: rows of each token.
        num_hidden: keys before the first token's window; it grows by one from token to token.
    """
    num_tokens, num_keys = len(scores_N_W) // num_rows, scores_N_W.shape[1]
    if num_hidden + num_tokens <= 1:
        return
    width = min(num_keys, num_hidden + num_tokens - 1)
    below = torch.ones(num_tokens, width, dtype=torch.bool, device=scores_N_W.device).tril(num_hidden - 1)
    scores_N_W[:, :width].masked_fill_(below.repeat_interleave(num_rows, 0), -torch.inf)


def _sinks_of(options: AttentionOptions, head: int, num_tokens: int, num_rows: int) -> Tensor | None:
    """The sinks of the rows of one key-value head, [N]."""
    if options.sinks_A is None:
        return None
    return options.sinks_A[head * num_rows : (head + 1) * num_rows].repeat(num_tokens)


def _weigh(scores_N_W: Tensor, values_W_D: Tensor, sinks_N: Tensor | None, out_N_D: Tensor) -> None:
    """The values, weighted by the softmax of scores, in place of these; written to `out_N_D`."""
    lse_N = None if sinks_N is None else torch.logsumexp(scores_N_W.to(wide(scores_N_W.dtype)), -1)
    torch.softmax(scores_N_W, -1, out=scores_N_W)
    torch.mm(scores_N_W, values_W_D, out=out_N_D)
    if sinks_N is not None and lse_N is not None:
        out_N_D *= torch.sigmoid(lse_N - sinks_N.to(lse_N.dtype))[:, None].to(out_N_D.dtype)
