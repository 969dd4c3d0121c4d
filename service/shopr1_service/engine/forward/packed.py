"""Run the rests of a group's completions in one row of tokens, on the model's own cache of the prompt.

    prompt … | completion 1 … | completion 2 … | …

Positions continue from the prompt in each completion. An explicit mask restricts each token to the prompt,
as far as its layer sees, and causally to its own completion. The prompt's keys and values exist once and
are never written to.

The model must consist of attention layers, take its positions from `position_ids`, and use an attention
implementation that respects a mask: flash attention does not.

Dimensions: P tokens of the prefix, T of the row, K = P + T, H hidden size.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from shopr1_service.engine.forward.base import MAX_PASS_TOKENS, batches
from shopr1_service.engine.forward.prefill import Ids, PrefilledForward

MAX_MASK_ELEMENTS = 64 * 2**20
"""T · K of one pass. Eager attention allocates a number for each element and head."""


class UnsupportedLayoutError(RuntimeError):
    """The model cannot run several completions in one row."""


class PackedForward(PrefilledForward):
    """All completions in one row, on the prompt's cache."""

    name = "packed"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._config: Any = model.config.get_text_config()
        self._dtype = model.dtype

    def _prefill(self, ids: Ids) -> tuple[Cache, Tensor]:
        if (obstacle := _obstacle(self._config)) is not None:
            raise UnsupportedLayoutError(obstacle)
        cache = DynamicCache()  # without the config, which would cut layers to their window
        output = self._trunk(input_ids=self._tensor([ids]), past_key_values=cache, use_cache=True)
        if cache.get_seq_length() != len(ids):
            raise UnsupportedLayoutError("the model does not use the cache that it is given")
        prefix = DynamicCache()
        prefix.layers = [_ReadOnlyLayer(cast("DynamicLayer", layer)) for layer in cache.layers]
        return prefix, output.last_hidden_state[0, -1:]

    def _rest_states(self, prefix: Cache, num_prefix_tokens: int, rests: Sequence[Ids]) -> list[Tensor]:
        def fits(batch: Sequence[Ids]) -> bool:
            num_tokens = sum(map(len, batch))
            num_elements = num_tokens * (num_prefix_tokens + num_tokens)
            return num_tokens <= MAX_PASS_TOKENS and num_elements <= MAX_MASK_ELEMENTS

        return [
            hidden_T_H
            for batch in batches(rests, fits)
            for hidden_T_H in self._batch(prefix, num_prefix_tokens, batch)
        ]

    def _batch(self, prefix: Cache, num_prefix_tokens: int, rests: Sequence[Ids]) -> Sequence[Tensor]:
        hidden_T_H = self._pass(prefix, num_prefix_tokens, rests)
        if len(rests) > 1 and not bool(hidden_T_H.isfinite().all()):
            # A mask cannot hide NaN: 0 · NaN is NaN. Run alone, a broken completion affects no other.
            return [self._pass(prefix, num_prefix_tokens, [rest]) for rest in rests]
        return torch.split(hidden_T_H, [len(rest) for rest in rests])

    def _pass(self, prefix: Cache, num_prefix_tokens: int, rests: Sequence[Ids]) -> Tensor:
        row = _Row.of(num_prefix_tokens, [len(rest) for rest in rests], self._device)
        output = self._trunk(
            input_ids=self._tensor([list(itertools.chain(*rests))]),
            position_ids=row.positions_K[None, num_prefix_tokens:],
            attention_mask=self._masks(row),
            past_key_values=prefix,
            use_cache=True,
        )
        hidden_T_H: Tensor = output.last_hidden_state[0]
        return hidden_T_H

    def _masks(self, row: "_Row") -> Tensor | dict[str, Tensor]:
        """The mask of all layers, or a mask for each kind of layer."""
        masks = {kind: self._for_attention(row.visible(kind, self._config)) for kind in _kinds(self._config)}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _for_attention(self, is_visible_T_K: Tensor) -> Tensor:
        """A mask [1, 1, T, K]: booleans for sdpa; eager attention adds the mask to its scores."""
        mask_T_K = is_visible_T_K
        if self._config._attn_implementation == "eager":
            mask_T_K = torch.zeros_like(is_visible_T_K, dtype=self._dtype)
            mask_T_K.masked_fill_(~is_visible_T_K, torch.finfo(self._dtype).min)
        return mask_T_K[None, None]


def _kinds(config: Any) -> set[str]:  # noqa: ANN401  # every architecture has its own
    """The kinds of the model's layers, by what they see."""
    if layer_types := getattr(config, "layer_types", None):
        return set(layer_types)
    has_window = getattr(config, "sliding_window", None) is not None
    return {"sliding_attention" if has_window else "full_attention"}


def _obstacle(config: Any) -> str | None:  # noqa: ANN401
    """A reason why packing is known to fail, which the check at load may not notice."""
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} may ignore a mask"
    if others := _kinds(config) - {"full_attention", "sliding_attention", "chunked_attention"}:
        return f"a mask means nothing to {', '.join(sorted(others))}"
    if getattr(config, "attn_temperature_tuning", False):
        # Llama 4 scales queries by their index in the cache, from index 8192 on.
        return "queries are scaled by something else than their position"
    return None


class _ReadOnlyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of the prefix. A pass appends its own for itself only."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = layer.keys, layer.values
        self.is_initialized = layer.is_initialized

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_options: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = cast("Tensor", self.keys), cast("Tensor", self.values)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


@dataclass(frozen=True)
class _Row:
    """Positions and owners of the tokens of prefix and row.

    Attributes:
        owners_K: 0 for the prefix, i for the i-th completion.
    """

    num_prefix_tokens: int
    positions_K: Tensor
    owners_K: Tensor

    @classmethod
    def of(cls, num_prefix_tokens: int, lengths: Sequence[int], device: torch.device) -> "_Row":
        P = num_prefix_tokens
        positions = [torch.arange(P), *(torch.arange(P, P + length) for length in lengths)]
        owners_K = torch.arange(len(lengths) + 1).repeat_interleave(torch.tensor([P, *lengths]))
        return cls(P, torch.cat(positions).to(device), owners_K.to(device))

    def visible(self, kind: str, config: Any) -> Tensor:  # noqa: ANN401
        """Whether each token of the row sees each key in a layer of this kind, [T, K]."""
        position_T_1 = self.positions_K[self.num_prefix_tokens :, None]
        owner_T_1 = self.owners_K[self.num_prefix_tokens :, None]
        is_own_T_K = (self.owners_K == 0) | (self.owners_K == owner_T_1)
        is_visible_T_K = is_own_T_K & (self.positions_K <= position_T_1)
        if kind == "sliding_attention":
            is_visible_T_K &= self.positions_K > position_T_1 - config.sliding_window
        elif kind == "chunked_attention":
            size = config.attention_chunk_size
            is_visible_T_K &= self.positions_K // size == position_T_1 // size
        return is_visible_T_K
