"""The fastest forward: a prompt once, kept across requests, read in place by all its completions.

1. The longest known beginning of the prompt is taken from the prefix cache.
2. The rest of it is run in one pass, together with what all completions begin with (`{"rationale": "`), and
   is kept.
3. What is left of the completions is packed into one row of tokens and run in one pass on top.

Needs a model whose attention is plain (`shared_attention.py`).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.forward import Suffix
from shopr1_service.head import trunk_of
from shopr1_service.prefix import Chunk, PrefixCache
from shopr1_service.shared_attention import Layout, Segment, SharedPrefixAttention

MAX_PASS_TOKENS = 8192
"""Tokens of one pass. Enough to fill any device; bounds what activations take of its memory."""


class SharedPrefixForward:
    """See the module. Used from one thread at a time."""

    name = "shared_prefix"

    def __init__(self, model: PreTrainedModel, cache: PrefixCache) -> None:
        self._trunk = trunk_of(model)
        self._device = model.device
        self._hidden_size = model.config.get_text_config().hidden_size
        self._dtype = model.dtype
        self._cache = cache
        self._attention = SharedPrefixAttention(model)

    @torch.inference_mode()
    def hidden_states(self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> list[Tensor]:
        known_ids = (*prompt_ids, *_common_lead(suffixes))
        chunks = self._prefix(known_ids, len(prompt_ids))
        last_1_H = self._last_hidden(chunks)
        num_shared = sum(map(len, chunks)) - len(prompt_ids)
        rests = [suffix.ids[num_shared:] for suffix in suffixes]
        segments = [Segment(ids, chunks) for ids in rests if ids]
        rows = iter([row for batch in _batches(segments) for row in self._run(batch)])
        states = []
        for suffix, ids in zip(suffixes, rests, strict=True):
            hidden_T_H = torch.cat([last_1_H, next(rows)]) if ids else last_1_H
            states.append(hidden_T_H[[1 + position - num_shared for position in suffix.positions]])
        return states

    def _prefix(self, known_ids: tuple[int, ...], num_prompt_tokens: int) -> list[Chunk]:
        """Chunks that spell the prompt, and as much behind it of `known_ids` as costs no pass of its own."""
        chunks = self._cache.match(known_ids)
        num_known = sum(map(len, chunks))
        has_end = num_known >= num_prompt_tokens and (not chunks or chunks[-1].last_hidden_1_H is not None)
        if has_end or not known_ids:
            return chunks
        if num_known == len(known_ids):
            # All is known but the last token's hidden state: it lies within a longer chunk.
            chunks[-1] = chunks[-1].view(0, len(chunks[-1]) - 1)
            chunks = [chunk for chunk in chunks if len(chunk)]  # attention kernels die of empty ones
            return [*chunks, self._new_chunk(known_ids[num_known - 1 :], chunks)]
        for start in range(num_known, len(known_ids), MAX_PASS_TOKENS):
            end = min(start + MAX_PASS_TOKENS, len(known_ids))
            chunk = self._new_chunk(known_ids[start:end], chunks)
            chunks = [*chunks, *self._keep(chunk, known_ids[:end], num_prompt_tokens)]
        return chunks

    def _keep(self, chunk: Chunk, known_ids: tuple[int, ...], num_prompt_tokens: int) -> list[Chunk]:
        """Put a new chunk into the cache, cut where the prompt ends: the next prompt may go on from there."""
        start, cut = len(known_ids) - len(chunk), num_prompt_tokens - (len(known_ids) - len(chunk))
        parts = [chunk]
        if 0 < cut < len(chunk) and self._cache.is_enabled:
            parts = [chunk.view(0, cut), chunk.view(cut, len(chunk))]
        for part in parts:
            self._cache.insert(known_ids[:start], part)
            start += len(part)
        return parts

    def _new_chunk(self, ids: Sequence[int], prefix: Sequence[Chunk]) -> Chunk:
        layout = Layout.of([Segment(ids, prefix)], self._device, records=True)
        hidden_T_H = self._pass(layout, ids)
        keys, values = zip(*(layout.recorded[layer] for layer in sorted(layout.recorded)), strict=True)
        return Chunk(tuple(ids), keys, values, hidden_T_H[-1:].clone())

    def _run(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Hidden states of each segment, [T, H]."""
        ids = [token_id for segment in segments for token_id in segment.ids]
        hidden_T_H = self._pass(Layout.of(segments, self._device, records=False), ids)
        return list(torch.split(hidden_T_H, [len(segment.ids) for segment in segments]))

    def _pass(self, layout: Layout, ids: Sequence[int]) -> Tensor:
        input_ids_1_T = torch.tensor([list(ids)], dtype=torch.long, device=self._device)
        with self._attention.laid_out(layout):
            output = self._trunk(
                input_ids=input_ids_1_T, position_ids=layout.position_ids_1_T, use_cache=False
            )
        hidden_T_H: Tensor = output.last_hidden_state[0]
        return hidden_T_H

    def _last_hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        if chunks and (last_1_H := chunks[-1].last_hidden_1_H) is not None:
            return last_1_H
        # An empty prompt: nothing asks for what comes before the first token.
        return torch.full((1, self._hidden_size), torch.nan, dtype=self._dtype, device=self._device)


def _batches(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Segments in order, in batches of at most MAX_PASS_TOKENS; a longer segment goes alone."""
    batch: list[Segment] = []
    num_tokens = 0
    for segment in segments:
        if batch and num_tokens + len(segment.ids) > MAX_PASS_TOKENS:
            yield batch
            batch, num_tokens = [], 0
        batch.append(segment)
        num_tokens += len(segment.ids)
    if batch:
        yield batch


def _common_lead(suffixes: Sequence[Suffix]) -> Sequence[int]:
    """What all suffixes begin with, up to the first position whose hidden state is wanted."""
    lead = suffixes[0].ids[: suffixes[0].positions[0] + 1]
    for suffix in suffixes[1:]:
        length = min(len(lead), suffix.positions[0] + 1)
        length = next((i for i in range(length) if suffix.ids[i] != lead[i]), length)
        lead = lead[:length]
    return lead
