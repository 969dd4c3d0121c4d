"""Attention of packed segments to shared prefixes, registered with transformers' `AttentionInterface`.

Several segments follow each other in one row of tokens. A token attends to the whole prefix of its segment,
without a mask, and causally to its own segment. The device decides between two implementations: `fused.py`
and `matmul.py`.

Sliding windows, softcaps, sinks and values shorter than keys are computed (`options.py`). Other attention
(biases, chunks, chosen keys) is refused, and so is every option that is not known here; the self-check then
chooses another forward strategy.

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

from shopr1_service.engine.attention.choice import KernelChoice
from shopr1_service.engine.attention.fused import FusedAttention
from shopr1_service.engine.attention.matmul import MatmulAttention
from shopr1_service.engine.attention.options import AttentionOptions
from shopr1_service.engine.lm_head import trunk_of
from shopr1_service.engine.prefix_cache import Segment
from shopr1_service.engine.transfer import on_device

_numbers = itertools.count()
"""Numbers of attention functions. Each model has its own, because it holds the layout of one pass."""

MIN_MATMUL_TOKENS = 64
"""Average tokens of a segment from which matrix products are faster than fused attention."""

Kernel = Callable[[int, Tensor, Tensor, Tensor, float | None, AttentionOptions], Tensor]
"""Layer, queries [1, A, T, D], keys and values [1, K, T, D], scale, options → [1, T, A, D]."""

_HARMLESS_OPTIONS = frozenset(
    {
        *("position_ids", "cache_position", "use_cache", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch"),
    }
)
"""Options that change no number of a row without a cache. Models hand down what their forward received."""


class UnsupportedAttentionError(RuntimeError):
    """The model's attention is more than scaled dot products with a causal mask."""


@dataclass
class Layout:
    """The layout of one row of segments, and the keys and values recorded from it.

    Attributes:
        records: whether to record keys and values.
        recorded: keys and values of the row by layer, [1, K, T, D].
    """

    kernel: Kernel
    position_ids_1_T: Tensor
    records: bool
    recorded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _layers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def num_tokens(self) -> int:
        return self.position_ids_1_T.shape[1]

    def next_layer(self) -> int:
        """The number of the attention layer that runs now. Recurrent layers between them are not counted."""
        return next(self._layers)


def choose_kernel(
    segments: Sequence[Segment], device: torch.device, dtype: torch.dtype, choice: KernelChoice | None = None
) -> Kernel:
    """The faster implementation for these segments.

    PyTorch's fused attention is slow in bfloat16 on CPUs without matrix units (AMX). Matrix products are
    faster there, unless the segments are short.
    """
    has_matrix_units = device.type != "cpu" or bool(torch.cpu.get_capabilities().get("amx_bf16"))
    num_tokens = sum(len(segment.ids) for segment in segments)
    is_short = num_tokens < MIN_MATMUL_TOKENS * len(segments)
    if has_matrix_units or dtype != torch.bfloat16 or is_short:
        return FusedAttention(segments, device, choice)
    return MatmulAttention(segments)


class SharedPrefixAttention:
    """The attention function of one model, active within `active`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = cast("PreTrainedConfig", trunk_of(model).config)
        self._device, self._dtype = model.device, model.dtype
        self._name = f"shopr1_shared_prefix_{next(_numbers)}"
        self._layout: Layout | None = None
        self._choice = KernelChoice()
        AttentionInterface.register(self._name, self)

    @property
    def kernel_name(self) -> str:
        """The fused kernels in use."""
        return self._choice.name

    def layout(self, segments: Sequence[Segment], *, records: bool) -> Layout:
        """The layout of one pass over these segments."""
        kernel = choose_kernel(segments, self._device, self._dtype, self._choice)
        return Layout(kernel, on_device(_positions(segments)[None], self._device), records)

    @contextmanager
    def active(self, layout: Layout) -> Iterator[None]:
        """Use this attention and layout in the forwards of the block."""
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
        **options: Any,  # noqa: ANN401  # architectures pass various options
    ) -> tuple[Tensor, None]:
        """Attention of queries [1, A, T, D] to keys and values [1, K, T, D]; returns [1, T, A, D]."""
        layout = self._layout
        num_rows, num_tokens = query.shape[0], query.shape[2]
        if layout is None or attention_mask is not None or num_rows * num_tokens != layout.num_tokens:
            raise UnsupportedAttentionError("other tokens than those of the layout")
        given = _read_options(module, options)
        num_dimensions = value.shape[-1]
        value = _padded(value, key.shape[-1])
        query, key, value = (_in_one_row(tensor) for tensor in (query, key, value))
        layer = layout.next_layer()
        if layout.records:
            # Copies: the model's tensors may be views of larger ones.
            layout.recorded[layer] = (_copy(key), _copy(value))
        out_1_T_A_D = layout.kernel(layer, query, key, value, scaling, given)[..., :num_dimensions]
        return out_1_T_A_D.reshape(num_rows, num_tokens, *out_1_T_A_D.shape[2:]), None


def _read_options(module: nn.Module, options: dict[str, Any]) -> AttentionOptions:
    """The options that are computed here; all others are refused.

    An option that is ignored makes another model of it: without its `indices`, sparse attention is dense.
    """
    if not (options.pop("is_causal", True) in (True, None) and getattr(module, "is_causal", True)):
        raise UnsupportedAttentionError("attention that is not causal")
    window, softcap = options.pop("sliding_window", None), options.pop("softcap", None)
    sinks_A = options.pop("s_aux", None)
    if not (window is None or (isinstance(window, int) and window > 0)):
        raise UnsupportedAttentionError(f"attention with sliding_window = {window!r}")
    for name, value in options.items():
        if value is not None and name not in _HARMLESS_OPTIONS:
            raise UnsupportedAttentionError(f"attention with {name}")
    return AttentionOptions(window, softcap, sinks_A)


def _padded(value: Tensor, num_dimensions: int) -> Tensor:
    """Values with zeros up to the size of keys: fused kernels take no other."""
    if value.shape[-1] > num_dimensions:
        raise UnsupportedAttentionError("values longer than keys")
    return nn.functional.pad(value, (0, num_dimensions - value.shape[-1]))


def _positions(segments: Sequence[Segment]) -> Tensor:
    return torch.cat([torch.arange(len(segment.ids)) + segment.num_prefix_tokens for segment in segments])


def _in_one_row(tensor_B_A_T_D: Tensor) -> Tensor:
    """Rows behind each other, [1, A, B · T, D]."""
    return tensor_B_A_T_D.transpose(0, 1).flatten(1, 2)[None]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
