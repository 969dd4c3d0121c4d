"""Run a prompt once, and continue from its recurrent states in each completion.

State space models, linear attention and short convolutions keep states of a fixed size instead of keys and
values. The states at a prompt's end are kept in the prefix cache, and copied for each completion: a row of a
batch, padded at its end, where no token that is read can see the padding. The attention layers between them
read the prompt's keys and values in place (`attention/shared_prefix.py`).

States are known at the ends of prompts only. A session's next prompt continues from there; a prompt that
shares no more than its beginning with others is run whole.

Dimensions: B rows, R tokens of a row, T tokens of a segment, H hidden size.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from shopr1_service.engine.attention.shared_prefix import Layout, SharedPrefixAttention
from shopr1_service.engine.forward.base import (
    MAX_PASS_TOKENS,
    IndependentForward,
    PromptGroup,
    Suffix,
    batches,
    token_tensor,
)
from shopr1_service.engine.forward.expanded import MIN_ROW_TOKENS, cache_name, takes_positions
from shopr1_service.engine.lm_head import trunk_of
from shopr1_service.engine.prefix_cache import Chunk, PrefixCache, Segment, States

MAX_ROWS = 16
"""Rows of one pass, as many as in the passes that measure memory at load: each has states of its own."""
MAX_PADDING_TOKENS = 256
"""Padding of one pass. More costs as much as another pass."""


def has_states(model: PreTrainedModel) -> bool:
    """Whether the model has recurrent layers, by the cache that transformers makes for it."""
    try:
        cache = DynamicCache(config=_config_of(model))
    except Exception:  # an architecture may have a cache of its own
        return False
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


class BranchedForward:
    """The prompt once, from the prefix cache or into it; its states are copied for each completion."""

    name = "branched"

    def __init__(self, model: PreTrainedModel, cache: PrefixCache) -> None:
        self._trunk = trunk_of(model)
        self._config = _config_of(model)
        self._device = model.device
        self._cache = cache
        self._cache_name = cache_name(self._trunk)
        self._takes_positions = takes_positions(self._trunk)
        self._attention = SharedPrefixAttention(model)
        self._independent = IndependentForward(model)
        self._chunk_sizes: dict[Any, int] = {
            each: size
            for each in self._trunk.modules()
            if isinstance(size := getattr(each, "chunk_size", None), int)
        }

    @property
    def attention(self) -> str:
        return self._attention.kernel_name or "model"

    def hidden_states(self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> list[Tensor]:
        return self.batch([PromptGroup(prompt_ids, suffixes)])[0]

    @torch.inference_mode()
    def batch(self, groups: Sequence[PromptGroup]) -> list[list[Tensor]]:
        prompts = [self._prompt(group) for group in groups]
        segments = [
            Segment(suffix.ids, chunks)
            for group, chunks in zip(groups, prompts, strict=True)
            for suffix in group.suffixes
            if suffix.ids and chunks
        ]
        rows = iter(self._rows(segments))
        return [
            [_at_positions(suffix, chunks, next(rows) if suffix.ids else None) for suffix in group.suffixes]
            if chunks
            else self._independent.hidden_states(group.prompt_ids, group.suffixes)
            for group, chunks in zip(groups, prompts, strict=True)
        ]

    # --- the prompt ---

    def _prompt(self, group: PromptGroup) -> list[Chunk]:
        """The chunks of a group's prompt: those that are known, and those of the missing tokens."""
        ids = tuple(group.prompt_ids)
        chunks = self._cache.match(ids, group.scope, with_states=True)
        # Padding would change the states at the end: too few tokens are run with those before them.
        while chunks and (0 < len(ids) - _length(chunks) < MIN_ROW_TOKENS or chunks[-1].states is None):
            chunks.pop()
        for part in _parts(ids[_length(chunks) :]):
            chunk = self._chunk(Segment(part, chunks))
            if group.is_kept:
                self._cache.insert(ids[: _length(chunks)], chunk, group.scope)
            chunks = [*chunks, chunk]
        return chunks

    def _chunk(self, segment: Segment) -> Chunk:
        layout = self._attention.layout([segment], records=True)
        states = _StateCache(self._config, [segment])
        hidden_T_H = self._pass(layout, states, [segment])[0]
        recorded = [layout.recorded[layer] for layer in sorted(layout.recorded)]
        return Chunk(
            tuple(segment.ids),
            tuple(keys for keys, _ in recorded),
            tuple(values for _, values in recorded),
            hidden_T_H[-1:].clone(),
            states.after(),
        )

    # --- completions ---

    def _rows(self, segments: Sequence[Segment]) -> list[Tensor]:
        """The hidden states of each segment, [T, H]."""
        order = sorted(range(len(segments)), key=lambda i: len(segments[i].ids))  # similar lengths together
        hidden: dict[int, Tensor] = {}
        for row_numbers in batches(order, lambda some: _fits([segments[i] for i in some])):
            row_numbers.sort(key=lambda i: id(segments[i].prefix))  # one read of a prefix for all its rows
            rows = self._padded_pass([segments[i] for i in row_numbers])
            hidden.update(zip(row_numbers, rows, strict=True))
        return [hidden[i] for i in range(len(segments))]

    def _padded_pass(self, segments: Sequence[Segment]) -> list[Tensor]:
        num_tokens = max(MIN_ROW_TOKENS, *(len(segment.ids) for segment in segments))
        padded = [
            Segment([*segment.ids, *[segment.ids[-1]] * (num_tokens - len(segment.ids))], segment.prefix)
            for segment in segments
        ]
        layout = self._attention.layout(padded, records=False)
        hidden_B_R_H = self._pass(layout, _StateCache(self._config, padded), padded)
        return [
            hidden_R_H[: len(segment.ids)] for segment, hidden_R_H in zip(segments, hidden_B_R_H, strict=True)
        ]

    def _pass(self, layout: Layout, states: "_StateCache", rows: Sequence[Segment]) -> Tensor:
        """The hidden states of rows of one length, [B, R, H]. `states` are those after the rows then."""
        options: dict[str, Any] = {self._cache_name: states}
        if self._takes_positions:
            options["position_ids"] = layout.position_ids_1_T.view(len(rows), -1)
        input_ids = token_tensor([row.ids for row in rows], self._device)
        with self._attention.active(layout), self._chunks_within(input_ids.shape[1]):
            output = self._trunk(input_ids=input_ids, use_cache=True, **options)
        hidden_B_R_H: Tensor = output.last_hidden_state
        return hidden_B_R_H

    @contextmanager
    def _chunks_within(self, num_tokens: int) -> Iterator[None]:
        """Scan in chunks that are hardly longer than the rows: Mamba 2 pads these to whole chunks.

        Most checkpoints have chunks of 256 tokens, completions some dozen. The size changes only rounding.
        """
        size = 1 << (num_tokens - 1).bit_length()
        try:
            for mixer, chunk_size in self._chunk_sizes.items():
                mixer.chunk_size = min(chunk_size, size)
            yield
        finally:
            for mixer, chunk_size in self._chunk_sizes.items():
                mixer.chunk_size = chunk_size


class _StateCache(DynamicCache):
    """The recurrent states of rows, copied from those at the ends of their prefixes.

    Keys and values are left to the attention function.

    Args:
        rows: all of them have a prefix, or none.
    """

    def __init__(self, config: PreTrainedConfig, rows: Sequence[Segment]) -> None:
        super().__init__(config=config)
        self._num_prefix_tokens = rows[0].num_prefix_tokens
        known = [row.prefix[-1].states or {} for row in rows if row.prefix]
        for kind, layer, number in known[0] if known else ():
            states_B = torch.cat([states[kind, layer, number] for states in known])
            update = self.update_conv_state if kind == "conv" else self.update_recurrent_state
            update(states_B, layer, number)

    def after(self) -> States:
        """The states after the rows, each [B, …]."""
        kinds = ("conv", "recurrent")
        return {
            (kind, i, number): state
            for i, layer in self._layers()
            for kind, by_number in zip(kinds, (layer.conv_states, layer.recurrent_states), strict=True)
            for number, state in by_number.items()
            if state is not None
        }

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_options: object
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._num_prefix_tokens

    def _layers(self) -> Iterator[tuple[int, LinearAttentionCacheLayerMixin]]:
        return (
            (i, layer)
            for i, layer in enumerate(self.layers)
            if isinstance(layer, LinearAttentionCacheLayerMixin)
        )


def _config_of(model: PreTrainedModel) -> PreTrainedConfig:
    return cast("PreTrainedConfig", trunk_of(model).config)


def _length(chunks: Sequence[Chunk]) -> int:
    return sum(map(len, chunks))


def _parts(ids: Sequence[int]) -> list[Sequence[int]]:
    """Parts of one pass each, of about equal length: none is so short that it would be padded."""
    num_parts = -(-len(ids) // MAX_PASS_TOKENS)
    bounds = [len(ids) * i // max(1, num_parts) for i in range(num_parts + 1)]
    return [ids[start:end] for start, end in itertools.pairwise(bounds)]


def _fits(segments: Sequence[Segment]) -> bool:
    lengths = [len(segment.ids) for segment in segments]
    num_cells = max(lengths) * len(lengths)
    num_padding = num_cells - sum(lengths)
    return len(lengths) <= MAX_ROWS and num_cells <= MAX_PASS_TOKENS and num_padding <= MAX_PADDING_TOKENS


def _at_positions(suffix: Suffix, chunks: Sequence[Chunk], hidden_T_H: Tensor | None) -> Tensor:
    """A suffix's requested hidden states, from its own and the prompt's last one."""
    last_1_H = chunks[-1].last_hidden_1_H
    assert last_1_H is not None
    states_T_H = last_1_H if hidden_T_H is None else torch.cat([last_1_H, hidden_T_H])
    return states_T_H[[position + 1 for position in suffix.positions]]
