"""Attention of packed segments, each with a prefix that others share.

Several segments lie one behind the other in one row of tokens. A token attends to the prefix of its segment,
which is complete and needs no mask, and causally to its own segment. How that is computed best depends on the
device: `merged_attention.py` or `written_attention.py`.

Registered with transformers' `AttentionInterface`. What a model asks for beyond plain scaled attention
(sliding window, softcap, sinks, bias) is refused, and another way of sharing is taken.

Dimensions: A query heads, K key-value heads, T tokens of the row, D head size.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from shopr1_service.engine.attention.fused import FusedAttention
from shopr1_service.engine.attention.matmul import MatmulAttention
from shopr1_service.engine.lm_head import trunk_of
from shopr1_service.engine.prefix_cache import Segment

_numbers = itertools.count()
"""Models in one process must not share an attention function: it holds the layout of one pass."""

MIN_WRITTEN_TOKENS = 64
"""Of a segment, on average, for attention to be written out."""

Kernel = Callable[[int, Tensor, Tensor, Tensor, float | None], Tensor]
"""Layer, queries [1, A, T, D], keys and values [1, K, T, D], scale → [1, T, A, D]."""


class UnsupportedAttentionError(RuntimeError):
    """The model's attention is more than scaled dot products with a causal mask."""


@dataclass
class Layout:
    """How the segments of one row lie, and what they leave behind.

    Attributes:
        recorded: keys and values of the row, [1, K, T, D] by layer, where `records` is set.
    """

    kernel: Kernel
    position_ids_1_T: Tensor
    records: bool
    recorded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def choose_kernel(segments: Sequence[Segment], device: torch.device, dtype: torch.dtype) -> Kernel:
    """The faster one.

    PyTorch's fused attention for CPUs is slow in bfloat16 where there are no matrix units (AMX). Plain matrix
    products are faster there, unless the segments are so short that they are small.
    """
    has_matrix_units = device.type != "cpu" or bool(torch.cpu.get_capabilities().get("amx_bf16"))
    num_tokens = sum(len(segment.ids) for segment in segments)
    is_short = num_tokens < MIN_WRITTEN_TOKENS * len(segments)
    if has_matrix_units or dtype != torch.bfloat16 or is_short:
        return FusedAttention(segments, device)
    return MatmulAttention(segments)


class SharedPrefixAttention:
    """The attention function of one model, in force within `laid_out`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = cast("PreTrainedConfig", trunk_of(model).config)
        self._device, self._dtype = model.device, model.dtype
        self._name = f"shopr1_shared_prefix_{next(_numbers)}"
        self._layout: Layout | None = None
        AttentionInterface.register(self._name, self)

    def layout(self, segments: Sequence[Segment], *, records: bool) -> Layout:
        """For one pass over these segments."""
        position_ids_1_T = _positions(segments)[None].to(self._device)
        return Layout(choose_kernel(segments, self._device, self._dtype), position_ids_1_T, records)

    @contextmanager
    def laid_out(self, layout: Layout) -> Iterator[None]:
        """Use this attention, with this layout, for the forwards in the block."""
        former = self._config._attn_implementation
        self._config._attn_implementation, self._layout = self._name, layout
        try:
            yield
        finally:
            self._config._attn_implementation, self._layout = former, None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,  # noqa: ANN401  # whatever an architecture passes
    ) -> tuple[Tensor, None]:
        """Attention over [1, A, T, D] queries and [1, K, T, D] keys and values; gives [1, T, A, D]."""
        layout = self._layout
        if layout is None or attention_mask is not None or query.shape[0] != 1:
            raise UnsupportedAttentionError("not a packed row")
        _refuse_extras(options)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layout.records:
            # Copies: what a model hands over may be a part of something larger.
            layout.recorded[layer] = (_copy(key), _copy(value))
        return layout.kernel(layer, query, key, value, scaling), None


def _refuse_extras(options: dict[str, Any]) -> None:
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise UnsupportedAttentionError(f"attention with {name}")


def _positions(segments: Sequence[Segment]) -> Tensor:
    return torch.cat([torch.arange(len(segment.ids)) + segment.num_prefix_tokens for segment in segments])


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
