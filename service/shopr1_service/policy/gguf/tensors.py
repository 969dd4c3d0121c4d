"""Tensors of GGUF files: RoPE factors, tensors that no model has, and how blocks are unpacked.

`rope_freqs.weight` holds a factor f_i for each pair i of rotated dimensions. llama.cpp rotates position t by

    t · θ^(−2i / d) / f_i

Llama 3.1 and later are converted with these instead of `rope_type: llama3` in a config.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.gguf.gguf_conversion_mapping import Dequantize
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from shopr1_service.errors import PolicyError
from shopr1_service.policy.gguf.config import ARCHITECTURE_KEY, Metadata, architecture_key

ROPE_FACTORS = "rope_freqs.weight"
_FULL_ATTENTION = ("inv_freq", "full_attention_inv_freq")
"""Buffers of frequencies; layers with a window have others."""
_TOLERANCE = 1e-5
"""Relative difference of two frequencies that fp32 explains."""


class ExactGgufQuantizer(GgufHfQuantizer):
    """Unpacks blocks in fp32 and rounds them once, to the model's dtype.

    Transformers' newer readers unpack in the model's dtype: in bf16, every step is rounded.
    """

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:  # noqa: ANN401
        conversions = super().update_weight_conversions(weight_conversions, model)  # type: ignore[no-untyped-call]
        for operation in (each for entry in conversions for each in getattr(entry, "operations", ())):
            if isinstance(operation, Dequantize):
                operation.dtype = torch.float32
        return conversions


def unpack_exactly() -> None:
    """Make transformers read all GGUF files of this process with `ExactGgufQuantizer`."""
    AUTO_QUANTIZER_MAPPING["gguf"] = ExactGgufQuantizer


def unused_tensors(model: PreTrainedModel, metadata: Metadata, names: Sequence[str]) -> list[str]:
    """Names of a GGUF file's tensors that no tensor of the model is read from, without `ROPE_FACTORS`.

    Args:
        names: of all tensors.
    """
    architecture = metadata[ARCHITECTURE_KEY]
    if is_gguf_arch_supported(architecture):  # loaded like safetensors, which reports them
        return []
    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=model.config.to_dict())
    used = get_gguf_hf_weights_map(model, processor).keys()
    # Experts are read under their names without `.weight`.
    unused = [name for name in names if not {name, name.rpartition(".")[0]} & used]
    return [name for name in unused if name != ROPE_FACTORS]


def check_rope(model: PreTrainedModel, metadata: Metadata, factors_I: Tensor | None) -> None:
    """Divide the model's frequencies by the factors, in place, and check their number.

    Args:
        factors_I: of I pairs of dimensions; None if the file has none.

    Raises:
        PolicyError: the model cannot compute with these factors, or rotates another number of dimensions.
    """
    frequencies = list(_frequencies(model))
    num_dimensions = architecture_key(metadata, "rope.dimension_count")
    for _, _, frequency_I in frequencies:
        if num_dimensions is not None and 2 * len(frequency_I) != num_dimensions:
            raise PolicyError(
                f"the GGUF file rotates {num_dimensions} dimensions of each head (rope.dimension_count), "
                f"{type(model).__name__} {2 * len(frequency_I)}: load the safetensors checkpoint instead"
            )
    if factors_I is None:
        return
    if not frequencies:
        raise _unusable(model, "it has no rotary embedding")
    for module, name, frequency_I in frequencies:
        _divide(model, module, name, frequency_I, factors_I)


def read_rope_factors(path: Path) -> Tensor:
    """The tensor `ROPE_FACTORS` of a GGUF file, [I] in fp32."""
    from gguf import GGUFReader  # slow to import, and only needed for these files

    [tensor] = (tensor for tensor in GGUFReader(path).tensors if tensor.name == ROPE_FACTORS)
    return torch.tensor(tensor.data, dtype=torch.float32).flatten()


def _frequencies(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in _FULL_ATTENTION:
                yield module, name, buffer


def _divide(
    model: PreTrainedModel, module: nn.Module, name: str, frequency_I: Tensor, factors_I: Tensor
) -> None:
    if frequency_I.shape != factors_I.shape:
        raise _unusable(model, f"it has {len(frequency_I)} frequencies and the file {len(factors_I)} factors")
    kind: Any = getattr(module, "rope_type", None)
    kind = kind["full_attention"] if isinstance(kind, dict) else kind
    if kind in ("default", "linear"):
        scaled_I = frequency_I / factors_I.to(frequency_I.device)
        for buffer_name in (name, name.replace("inv_freq", "original_inv_freq")):
            module.get_buffer(buffer_name).copy_(scaled_I)
    elif kind != "proportional" or not _has_factors(model, frequency_I, factors_I):
        raise _unusable(model, f"its rotary embedding is of type {kind!r}")


def _has_factors(model: PreTrainedModel, frequency_I: Tensor, factors_I: Tensor) -> bool:
    """Whether the model has these factors from its config: Gemma 4 does not rotate where they are huge."""
    theta = model.config.get_text_config().rope_parameters["full_attention"]["rope_theta"]
    pairs_I = torch.arange(len(factors_I), dtype=torch.float64)
    expected_I = theta ** (-pairs_I / len(factors_I)) / factors_I.double()
    return torch.allclose(frequency_I.double().cpu(), expected_I, rtol=_TOLERANCE, atol=1e-12)


def _unusable(model: PreTrainedModel, reason: str) -> PolicyError:
    return PolicyError(
        f"the GGUF file has factors for the rotary embedding ({ROPE_FACTORS}) that {type(model).__name__} "
        f"cannot use: {reason}; load the safetensors checkpoint instead"
    )
