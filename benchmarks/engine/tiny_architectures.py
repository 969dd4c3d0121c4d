"""Tiny random models of every architecture that the installed transformers knows.

A config's sizes are made small by their names, in the config and in its parts. Where an architecture needs
more, `OPTIONS` says what.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

NUM_VOCAB = 389
MAX_TOKENS = 512

SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "pad_vocab_size"), NUM_VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("embedding_size", "text_hidden_size", "hidden_dim", "emb_dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "dense_intermediate_size"), 32
    ),
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "depth", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "d_head"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 512
    ),
    **dict.fromkeys(("context_length",), 512),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "sliding_window_size"), 24),
    **dict.fromkeys(("index_topk", "keep_window_size", "attention_window_size"), 24),
    **dict.fromkeys(("index_n_heads",), 4),
    **dict.fromkeys(("index_head_dim",), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 16),
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Small sizes by the names that configs give them."""

_LATENT: Mapping[str, Any] = {"num_key_value_heads": 4}
_CONVOLUTION: Mapping[str, Any] = {"layer_types": ["conv", "full_attention"]}
_AXES: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
_HEADS: Mapping[str, Any] = {"head_dim": 16}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        (
            *("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "axk1", "axk2", "kimi_k2", "longcat_flash"),
            *("minicpm3", "glm4_moe_lite", "youtu", "mistral_large4_text"),
            "dots3_note_text",
        ),
        _LATENT,
    ),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _HEADS),
    "bailing_hybrid": {**_LATENT, "num_expert_group": 1, "num_experts_per_tok": 2},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(["sliding_attention", "full_attention"], _AXES),
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_output_size": 64},
    "ernie4_5_vl_moe_text": {"rope_parameters": _AXES},
    "glm5_next_text": {
        **_LATENT,
        "index_topk": 32,
        "qk_rope_head_dim": 0,
        "linear_num_heads": 2,
        "linear_head_dim": 8,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "granite_docling_vision": {"out_hidden_size": 64},
    "hunyuan_vl_text": {**_HEADS, "rope_parameters": {**_AXES, "mrope_section": [2, 2, 2, 2]}},
    "kimi_linear": {**_LATENT, "num_experts_per_tok": 2, "linear_num_heads": 2, "linear_head_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "mistral4": {**_LATENT, "head_dim": 16},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"num_hidden_layers": 4, "out_hidden_size": 64},
    "nemotron": {**_HEADS, "num_key_value_heads": 2},
    "radio": {"video_temporal_patch_size": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 24,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "step3p5": {"sliding_window": 24},
    "xmod": {"default_language": "en_XX", "max_position_embeddings": 514},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_block_size": 8,
        "index_topk_blocks": 3,
        "rotary_dim": 8,
    },
    "reformer": {
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 16,
        "num_buckets": 8,
    },
}
"""Further options of single architectures."""

_TIMM = "its image part is timm's, and needs the packages timm and Pillow, which are not installed"
_AUDIO_CODES = "its tokens are codes of sound; its class takes the config of its decoder only"
_DRAFTER = "it drafts for Gemma 4 and computes from that model's states and keys, not from tokens alone"
CAUSES: Mapping[str, str] = {
    **dict.fromkeys(("gemma3n", "fast_vlm", "perception_lm"), _TIMM),
    **dict.fromkeys(("musicgen", "musicgen_melody"), _AUDIO_CODES),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTER),
    "evolla": "transformers lists it, and its own class for such models does not take its config",
    "inkling_mm_model": "its image part needs the package scipy, which is not installed",
    "pi0": "it predicts a robot's movements from images and a state, and not tokens",
}
"""Why an architecture cannot be built here, or is no language model."""

SECTIONED = frozenset(
    {
        *("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text"),
        *("glm4v_text", "glm4v_moe_text", "glm_ocr_text"),
    }
)
"""Parts with sections of RoPE that their configs do not state: the default is for heads of 64 pairs."""


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
        kind: its `model_type`.
        is_image_text: whether it is the text path of an image-text model.
    """

    kind: str
    class_name: str
    is_image_text: bool = False


def architectures() -> Iterator[Architecture]:
    """All language models, then the image-text models."""
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        yield Architecture(kind, _first(name))
    for kind, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            yield Architecture(kind, _first(name), is_image_text=True)


def _first(name: str | tuple[str, ...]) -> str:
    return name if isinstance(name, str) else name[0]


def build(architecture: Architecture) -> PreTrainedModel:
    """A tiny model with random weights, fp32."""
    config = AutoConfig.for_model(architecture.kind, **_small(AutoConfig.for_model(architecture.kind)))
    auto: Any = AutoModelForImageTextToText if architecture.is_image_text else AutoModelForCausalLM
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    _disturb(model)
    model.train(False)
    return model


def _small(config: Any) -> dict[str, Any]:  # noqa: ANN401  # every architecture has its own
    """Small sizes for a config and its parts, as arguments to make it with, and their own `OPTIONS`."""
    options: dict[str, Any] = {}
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            options[name] = {"model_type": value.model_type, **_small(value)}
        elif name in SIZES and isinstance(value, type(SIZES[name])) and value is not False:
            options[name] = SIZES[name]
    if hasattr(config, "is_decoder"):
        options["is_decoder"] = True
    if "qk_rope_head_dim" in options and "head_dim" in options:  # latent attention: the rotated part alone
        options["head_dim"] = options["qk_rope_head_dim"]
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and ("mrope_section" in rope or config.model_type in SECTIONED):
        options["rope_parameters"] = {**rope, "mrope_section": _sections(rope, options)}
    num_layers = options.get("num_hidden_layers")
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "indexer_types"):
        kinds = vars(config).get(name)
        if isinstance(kinds, list) and isinstance(num_layers, int):
            options[name] = _each_kind(kinds, num_layers)
    return {**options, **OPTIONS.get(config.model_type, {})}


def _sections(rope: Mapping[str, Any], options: Mapping[str, Any]) -> list[int]:
    """Parts of the rotated pairs of a head for time, height and width."""
    num_pairs = int(options.get("head_dim", 16) * (rope.get("partial_rotary_factor") or 1)) // 2
    side = num_pairs * 3 // 8
    return [num_pairs - 2 * side, side, side]


def _each_kind(kinds: list[Any], num_layers: int) -> list[Any]:
    """A layer of each kind, as far as there are layers."""
    distinct = list(dict.fromkeys(kinds))[:num_layers]
    return distinct + [distinct[-1]] * (num_layers - len(distinct))


@torch.no_grad()
def _disturb(model: PreTrainedModel) -> None:
    """Random biases and norms: at 0 and 1 their loss would go unnoticed."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
