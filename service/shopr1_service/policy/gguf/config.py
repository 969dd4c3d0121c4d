"""Metadata of GGUF files that transformers leaves out of a model's config.

Transformers maps a few metadata keys per architecture and drops the others; the config then has the defaults
of its class, and the model computes other numbers. `complete_config` adds what llama.cpp reads:

    rope.freq_base, rope.scaling.*    Gemma 3 scales by 8, Qwen uses YaRN, StarCoder2 has another base
    rope.dimension_count              partial rotary embeddings
    attention.sliding_window, attn_logit_softcapping, final_logit_softcapping, attention.layer_norm_epsilon
    query_pre_attn_scalar             not in files: llama.cpp knows it by the number of layers (Gemma, 27B)
"""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from shopr1_service.errors import PolicyError

Metadata = Mapping[str, Any]

ARCHITECTURE_KEY = "general.architecture"
_ATTRIBUTES = {
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
}
"""Attributes of configs, by metadata key; a config has at most one of each."""
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def architecture_key(metadata: Metadata, name: str) -> Any:  # noqa: ANN401  # numbers, strings and arrays
    """Value of `{architecture}.{name}`; None if the file does not have it."""
    return metadata.get(f"{metadata[ARCHITECTURE_KEY]}.{name}")


def complete_config(config: PretrainedConfig, metadata: Metadata) -> None:
    """Set what the file states and transformers does not read, in place.

    Raises:
        PolicyError: the file scales its rotary embedding in a way that transformers cannot compute.
    """
    text = config.get_text_config()
    for key, attributes in _ATTRIBUTES.items():
        value = architecture_key(metadata, key)
        for attribute in attributes:
            if value is not None and hasattr(text, attribute):
                setattr(text, attribute, value or None)
    layers = _LAYERS_OF_27B.get(metadata[ARCHITECTURE_KEY])
    if layers is not None and layers == text.num_hidden_layers:
        text.query_pre_attn_scalar = text.hidden_size // text.num_attention_heads
    if getattr(text, "rope_parameters", None):
        _complete_rope(text, metadata)


def _complete_rope(config: PretrainedConfig, metadata: Metadata) -> None:
    own = config.rope_parameters.get("full_attention", config.rope_parameters)
    given = _rope_scaling(metadata)
    if own.get("rope_type", "default") != "default":  # transformers reads these itself
        if given and given["rope_type"] != own["rope_type"]:
            raise _unsupported(metadata, own["rope_type"])
        return
    own.update(given)
    if (base := architecture_key(metadata, "rope.freq_base")) is not None:
        own["rope_theta"] = base
    num_dimensions = architecture_key(metadata, "rope.dimension_count")
    if num_dimensions is not None and "partial_rotary_factor" in own:
        own["partial_rotary_factor"] = num_dimensions / _head_dim(config)


def _rope_scaling(metadata: Metadata) -> dict[str, Any]:
    """RoPE parameters of transformers; empty if the file scales nothing."""
    kind = architecture_key(metadata, "rope.scaling.type") or "linear"
    factor = architecture_key(metadata, "rope.scaling.factor")
    factor = factor or architecture_key(metadata, "rope.scale_linear") or 1.0
    if kind == "none" or factor == 1.0:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = architecture_key(metadata, "rope.scaling.original_context_length")
    attention_factor = architecture_key(metadata, "rope.scaling.attn_factor") or 1.0
    if kind != "yarn" or original is None or attention_factor != 1.0:
        raise _unsupported(metadata, "default")
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}


def _unsupported(metadata: Metadata, own: str) -> PolicyError:
    stated = {key: value for key, value in metadata.items() if ".rope.scaling." in key}
    return PolicyError(
        f"the GGUF file scales its rotary embedding ({stated}), which transformers does not read for this "
        f"architecture (it computes {own!r}): load the safetensors checkpoint instead"
    )


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
