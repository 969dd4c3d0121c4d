"""Attention by PyTorch's fused kernels: to a prefix and to the own segment, merged by log-sum-exp.

    out = Σ_i exp(lse_i − lse) · out_i,    lse = ln Σ_i exp(lse_i)

The merge is exact. A prefix is read once for all consecutive segments that share it. It is never copied,
and no mask is built.

Dimensions: A query heads, K key-value heads, T tokens of the row, D head size, S segments, R longest segment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from shopr1_service.engine.attention.choice import KernelChoice
from shopr1_service.engine.attention.kernels import attend, banded, wide
from shopr1_service.engine.attention.options import PLAIN, AttentionOptions
from shopr1_service.engine.prefix_cache import Chunk, Segment, starts_of
from shopr1_service.engine.transfer import on_device

_NUM_BLOCK_TOKENS = 256
"""Tokens whose windows are cut together: the mask of a block is at most so wide beyond the window."""


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
    """Consecutive segments of the row that have the same prefix.

    Attributes:
        start: the first segment's start in the row.
        lengths: of the segments.
    """

    start: int
    lengths: Sequence[int]
    chunks: Sequence[Chunk]

    @cached_property
    def num_prefix_tokens(self) -> int:
        return sum(map(len, self.chunks))

    @cached_property
    def positions(self) -> Sequence[int]:
        """Positions of the tokens, counted from the end of the prefix."""
        return [position for length in self.lengths for position in range(length)]

    @property
    def tokens(self) -> slice:
        """The place of the tokens in the row."""
        return slice(self.start, self.start + sum(self.lengths))


@dataclass(frozen=True)
class _Part:
    """Keys of a chunk that tokens of a row see.

    Attributes:
        tokens: the place of the tokens in the row.
        keys: the place of the keys in the chunk.
        mask_N_W: of the N tokens; None if each of them sees all the keys.
    """

    tokens: slice
    chunk: Chunk
    keys: slice
    mask_N_W: Tensor | None = None


class FusedAttention:
    """The attention of one row of segments."""

    def __init__(
        self, segments: Sequence[Segment], device: torch.device, choice: KernelChoice | None = None
    ) -> None:
        starts = starts_of(segments)
        self._choice = choice or KernelChoice()
        self._buckets = _buckets(segments, starts, device)
        self._shares = _shares(segments, starts)
        self._parts: dict[int | None, list[_Part]] = {}
        self._bands: dict[tuple[int, int, int], Tensor] = {}

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
        kernel = self._choice.of(query, key)
        out, lse = self._own_part(query, key, value, scale, options, kernel)
        for part in self._parts_of(options.window, query):
            _add_prefix_part(part, layer, query, out, lse, scale, options.softcap, kernel)
        if options.sinks_A is not None:
            # The share of all weights that is left to keys: Σ exp(score) / (Σ exp(score) + exp(sink)).
            out = out * torch.sigmoid(lse - options.sinks_A.to(lse.dtype)[:, None])[..., None]
        return out.to(query.dtype).transpose(1, 2).contiguous()

    def _parts_of(self, window: int | None, like: Tensor) -> list[_Part]:
        """The parts of prefixes that tokens see: the same in all layers with this window."""
        if window not in self._parts:
            self._parts[window] = [part for share in self._shares for part in _parts(share, window, like)]
        return self._parts[window]

    def _own_part(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        options: AttentionOptions,
        kernel: str,
    ) -> tuple[Tensor, Tensor]:
        """Causal attention within each segment: [1, A, T, D], widened, and its log-sum-exp [1, A, T]."""
        if len(self._buckets) == 1 and len(self._buckets[0].tokens_S_R) == 1:
            return self._attend_own(query, key, value, scale, options, kernel)
        out_A_T_D = torch.empty_like(query[0], dtype=wide(query.dtype))
        lse_A_T = out_A_T_D.new_empty(out_A_T_D.shape[:2])
        for bucket in self._buckets:
            query_S, key_S, value_S = (
                tensor[0, :, bucket.tokens_S_R].transpose(0, 1) for tensor in (query, key, value)
            )
            out_S_A_R_D, lse_S_A_R = self._attend_own(query_S, key_S, value_S, scale, options, kernel)
            out_A_T_D[:, bucket.tokens_N] = out_S_A_R_D.transpose(0, 1).flatten(1, 2)[:, bucket.cells_N]
            lse_A_T[:, bucket.tokens_N] = lse_S_A_R.transpose(0, 1).flatten(1, 2)[:, bucket.cells_N]
        return out_A_T_D[None], lse_A_T[None]

    def _attend_own(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        options: AttentionOptions,
        kernel: str,
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of segments of one length to themselves, in blocks where a window cuts them."""
        num_tokens, window, softcap = query.shape[2], options.window, options.softcap
        if window is None or num_tokens <= window:
            return attend(query, key, value, scale, is_causal=True, softcap=softcap, kernel=kernel)
        outs, lses = [], []
        for start in range(0, num_tokens, _NUM_BLOCK_TOKENS):
            end, first = min(start + _NUM_BLOCK_TOKENS, num_tokens), max(0, start - window + 1)
            seen = slice(first, end)
            out, lse = attend(
                *(query[:, :, start:end], key[:, :, seen], value[:, :, seen], scale),
                mask_R_W=self._band(end - start, start - first, window, query),
                softcap=softcap,
            )
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def _band(self, num_queries: int, num_before: int, window: int, like: Tensor) -> Tensor:
        """The mask of a block to the keys before it and its own: the same in all layers with this window."""
        shape = (num_queries, num_before, window)
        if shape not in self._bands:
            keys_W = torch.arange(-num_before, num_queries, device=like.device)
            self._bands[shape] = banded(keys_W[num_before:], keys_W, window, like)
        return self._bands[shape]


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
    return _Bucket(*(on_device(tensor, device) for tensor in (tokens_S_R, tokens_N, cells_N)))


def _shares(segments: Sequence[Segment], starts: Sequence[int]) -> list[_Share]:
    pairs = zip(segments, starts, strict=False)
    groups = [list(group) for _, group in groupby(pairs, key=lambda pair: id(pair[0].prefix))]
    return [
        _Share(group[0][1], [len(segment.ids) for segment, _ in group], group[0][0].prefix)
        for group in groups
        if group[0][0].prefix
    ]


def _parts(share: _Share, window: int | None, like: Tensor) -> Iterator[_Part]:
    """The parts of a prefix that the tokens of a share see."""
    if window is None:
        yield from (_Part(share.tokens, chunk, slice(0, len(chunk))) for chunk in share.chunks)
        return
    for first in range(0, len(share.positions), _NUM_BLOCK_TOKENS):
        positions_N = torch.tensor(share.positions[first : first + _NUM_BLOCK_TOKENS])
        start = share.start + first
        tokens = slice(start, start + len(positions_N))
        yield from _parts_within(share.chunks, tokens, positions_N + share.num_prefix_tokens, window, like)


def _parts_within(
    chunks: Sequence[Chunk], tokens: slice, positions_N: Tensor, window: int, like: Tensor
) -> Iterator[_Part]:
    """Keys that all these tokens see, without a mask, and a band that some of them see.

    The band is as wide as the positions lie apart.

    Args:
        positions_N: of the tokens, counted as those of the keys, from the prefix's first token.
    """
    seen_by_some = max(0, int(positions_N.min()) - window + 1)
    seen_by_all = max(0, int(positions_N.max()) - window + 1)
    start = 0
    for chunk in chunks:
        middle = min(max(seen_by_all - start, 0), len(chunk))
        begin = min(max(seen_by_some - start, 0), middle)
        if begin < middle:
            keys_W = torch.arange(start + begin, start + middle, device=like.device)
            mask_N_W = banded(on_device(positions_N, like.device), keys_W, window, like)
            yield _Part(tokens, chunk, slice(begin, middle), mask_N_W)
        if middle < len(chunk):
            yield _Part(tokens, chunk, slice(middle, len(chunk)))
        start += len(chunk)


def _add_prefix_part(
    part: _Part,
    layer: int,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
    softcap: float | None,
    kernel: str,
) -> None:
    """Merge attention to a part of a prefix into `out` and `lse`, in place."""
    place = part.tokens
    key, value = part.chunk.keys[layer][:, :, part.keys], part.chunk.values[layer][:, :, part.keys]
    prefix_out, prefix_lse = attend(
        query[:, :, place], key, value, scale, mask_R_W=part.mask_N_W, softcap=softcap, kernel=kernel
    )
    own_lse = lse[:, :, place]
    # exp(lse_prefix − lse_both) is a sigmoid of the difference, which cannot overflow.
    weight = torch.sigmoid(prefix_lse - own_lse)[..., None]
    out[:, :, place] = torch.lerp(out[:, :, place], prefix_out, weight)
    lse[:, :, place] = torch.logaddexp(own_lse, prefix_lse)
