"""The fastest strategy: run a prompt once, keep it across requests, read it in place.

1. The longest cached beginning of each prompt is taken from the prefix cache.
2. The rest of the prompt is run together with the common beginning of its completions (`{"rationale": "`),
   and is cached.
3. The rests of the completions are packed into one row of tokens and run on top.

Several groups share the passes of steps 2 and 3, up to `MAX_PASS_TOKENS`. Prompts with a common beginning
do not share step 2: the second waits until that beginning is cached.

The model must have plain attention (`attention/shared_prefix.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.core import PromptScope
from shopr1_service.engine.attention.shared_prefix import Layout, SharedPrefixAttention
from shopr1_service.engine.forward.base import (
    MAX_PASS_TOKENS,
    PromptGroup,
    Suffix,
    batches,
    common_lead,
    token_tensor,
)
from shopr1_service.engine.lm_head import trunk_of
from shopr1_service.engine.prefix_cache import Chunk, PrefixCache, Segment, common_length
from shopr1_service.engine.transfer import on_device

MIN_SHARED_TOKENS = 64
"""Common tokens of two prompts from which one waits for the other."""


@dataclass
class _Prefix:
    """The common prefix of a group's completions, as far as it is computed.

    Attributes:
        ids: the prompt, then the common beginning of the completions.
        chunks: keys and values of the first `num_known` of `ids`.
        is_cached: whether new chunks go into the prefix cache.
    """

    ids: tuple[int, ...]
    num_prompt_tokens: int
    scope: PromptScope
    chunks: list[Chunk] = field(default_factory=list)
    is_cached: bool = True

    @classmethod
    def of(cls, group: PromptGroup) -> "_Prefix":
        ids = (*group.prompt_ids, *common_lead(group.suffixes))
        return cls(ids, len(group.prompt_ids), group.scope, is_cached=group.is_kept)

    @property
    def num_known(self) -> int:
        return sum(map(len, self.chunks))

    @property
    def is_complete(self) -> bool:
        """Whether the prompt and its last hidden state are known. The lead alone is not worth a pass."""
        has_end = not self.chunks or self.chunks[-1].last_hidden_1_H is not None
        return not self.ids or (self.num_known >= max(1, self.num_prompt_tokens) and has_end)


class SharedPrefixForward:
    """The prompt once, from the prefix cache or into it. Used from one thread at a time."""

    name = "shared_prefix"

    def __init__(self, model: PreTrainedModel, cache: PrefixCache) -> None:
        self._trunk = trunk_of(model)
        self._device = model.device
        self._hidden_size = model.config.get_text_config().hidden_size
        self._dtype = model.dtype
        self._cache = cache
        self._attention = SharedPrefixAttention(model)

    @property
    def attention(self) -> str:
        return self._attention.kernel_name

    def hidden_states(self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> list[Tensor]:
        return self.batch([PromptGroup(prompt_ids, suffixes)])[0]

    @torch.inference_mode()
    def batch(self, groups: Sequence[PromptGroup]) -> list[list[Tensor]]:
        prefixes = [_Prefix.of(group) for group in groups]
        waiting = prefixes
        while waiting:
            wave, waiting = self._wave(waiting)
            self._complete(wave)
        rests = [
            [suffix.ids[prefix.num_known - prefix.num_prompt_tokens :] for suffix in group.suffixes]
            for group, prefix in zip(groups, prefixes, strict=True)
        ]
        segments = [
            Segment(ids, prefix.chunks)
            for own, prefix in zip(rests, prefixes, strict=True)
            for ids in own
            if ids
        ]
        rows = iter([row for batch in batches(segments, _fits) for row in self._run(batch)])
        return [
            [
                self._at_positions(suffix, prefix, next(rows) if ids else None)
                for suffix, ids in zip(group.suffixes, own, strict=True)
            ]
            for group, prefix, own in zip(groups, prefixes, rests, strict=True)
        ]

    def _wave(self, waiting: Sequence[_Prefix]) -> tuple[list[_Prefix], list[_Prefix]]:
        """Split into prefixes to run now, looked up in the cache, and those that wait for one of these."""
        wave: list[_Prefix] = []
        later: list[_Prefix] = []
        for prefix in waiting:
            if self._cache.is_enabled and any(
                other.is_cached
                and prefix.scope == other.scope
                and common_length(prefix.ids, other.ids) >= other.num_known + MIN_SHARED_TOKENS
                for other in wave
            ):
                later.append(prefix)
            else:
                self._look_up(prefix)
                wave.append(prefix)
        return wave, later

    def _look_up(self, prefix: _Prefix) -> None:
        prefix.chunks = self._cache.match(prefix.ids, prefix.scope)
        if not prefix.is_complete and prefix.num_known == len(prefix.ids):
            # Only the last token's hidden state is missing: the token lies inside a longer chunk.
            last = prefix.chunks.pop()
            if len(last) > 1:  # attention kernels crash on empty chunks
                prefix.chunks.append(last.view(0, len(last) - 1))
            prefix.is_cached = False

    def _complete(self, wave: Sequence[_Prefix]) -> None:
        """Run the missing tokens, in passes that the whole wave shares."""
        missing = [prefix for prefix in wave if not prefix.is_complete]
        while missing:
            num_free = MAX_PASS_TOKENS
            parts: list[tuple[_Prefix, Segment]] = []
            for prefix in missing:
                ids = prefix.ids[prefix.num_known : prefix.num_known + num_free]
                num_free -= len(ids)
                if ids:
                    parts.append((prefix, Segment(ids, prefix.chunks)))
            chunks = self._new_chunks([segment for _, segment in parts])
            for (prefix, _), chunk in zip(parts, chunks, strict=True):
                prefix.chunks = [*prefix.chunks, *self._cached(chunk, prefix)]
            missing = [prefix for prefix in missing if prefix.num_known < len(prefix.ids)]

    def _cached(self, chunk: Chunk, prefix: _Prefix) -> list[Chunk]:
        """Cache a new chunk, cut at the prompt's end: the next prompt may continue from there."""
        start = prefix.num_known
        if not (prefix.is_cached and self._cache.is_enabled):
            return [chunk]
        cut, parts = prefix.num_prompt_tokens - start, [chunk]
        if 0 < cut < len(chunk):
            # Copies: of two views, the one that is evicted first would leave all of its memory to the other.
            parts = [chunk.view(0, cut).copy(), chunk.view(cut, len(chunk)).copy()]
        for part in parts:
            self._cache.insert(prefix.ids[:start], part, prefix.scope)
            start += len(part)
        return parts

    def _new_chunks(self, segments: Sequence[Segment]) -> list[Chunk]:
        layout = self._attention.layout(segments, records=True)
        hidden_T_H = self._pass(layout, segments)
        keys, values = zip(*(layout.recorded[layer] for layer in sorted(layout.recorded)), strict=True)
        ids = tuple(token_id for segment in segments for token_id in segment.ids)
        row = Chunk(ids, keys, values, None)
        chunks, end = [], 0
        for segment in segments:
            start, end = end, end + len(segment.ids)
            chunk = row if len(segments) == 1 else row.view(start, end).copy()
            chunks.append(replace(chunk, last_hidden_1_H=hidden_T_H[end - 1 : end].clone()))
        return chunks

    def _run(self, segments: Sequence[Segment]) -> list[Tensor]:
        """The hidden states of each segment, [T, H]."""
        hidden_T_H = self._pass(self._attention.layout(segments, records=False), segments)
        return list(torch.split(hidden_T_H, [len(segment.ids) for segment in segments]))

    def _pass(self, layout: Layout, segments: Sequence[Segment]) -> Tensor:
        ids = [token_id for segment in segments for token_id in segment.ids]
        with self._attention.active(layout):
            output = self._trunk(
                input_ids=token_tensor([ids], self._device),
                position_ids=layout.position_ids_1_T,
                use_cache=False,
            )
        hidden_T_H: Tensor = output.last_hidden_state[0]
        return hidden_T_H

    def _at_positions(self, suffix: Suffix, prefix: _Prefix, rest_T_H: Tensor | None) -> Tensor:
        """A suffix's requested hidden states, from those of its rest and the prefix's last one."""
        last_1_H = self._last_hidden(prefix.chunks)
        hidden_T_H = last_1_H if rest_T_H is None else torch.cat([last_1_H, rest_T_H])
        first = prefix.num_known - prefix.num_prompt_tokens - 1
        rows = torch.tensor([position - first for position in suffix.positions])
        return hidden_T_H[on_device(rows, self._device)]

    def _last_hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        if chunks and (last_1_H := chunks[-1].last_hidden_1_H) is not None:
            return last_1_H
        # An empty prompt: no hidden state before the first token is requested.
        return torch.full((1, self._hidden_size), torch.nan, dtype=self._dtype, device=self._device)


def _fits(segments: Sequence[Segment]) -> bool:
    return sum(len(segment.ids) for segment in segments) <= MAX_PASS_TOKENS
