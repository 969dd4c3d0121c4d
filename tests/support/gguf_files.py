"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.models import byte_level_json

_CONTROL, _NORMAL = 3, 1
_NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
}


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    architecture: str = "llama",
    pre: str | None = "gpt-2",
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    tokenizer: str | None = None,
) -> Path:
    """A GGUF file.

    Args:
        metadata: without the architecture in its keys, if these begin with a dot.
        pre: `tokenizer.ggml.pre`; None for none.
        kinds: block types of tensors that are quantised; others are fp32.
        tokenizer: a tokenizer.json of byte-level BPE; default: `byte_level_json`.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, f"{architecture}{key}" if key.startswith(".") else key, value)
    _add_tokenizer(writer, json.loads(tokenizer or byte_level_json()), pre)
    for name, tensor in tensors.items():
        numbers = tensor.detach().float().numpy()
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, numbers)
        else:
            writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A Llama's tensors by their names in GGUF files, queries and keys in llama.cpp's order."""
    config = model.config
    heads = {"attn_q.": config.num_attention_heads, "attn_k.": config.num_key_value_heads}
    tensors = {}
    for name, tensor in model.state_dict().items():
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        for part, num_heads in heads.items():
            if part in name:
                tensor = _interleaved(tensor, num_heads)
        tensors[name] = tensor
    return tensors


def llama_metadata(model: PreTrainedModel, **extra: Any) -> dict[str, Any]:
    """A Llama's metadata for `write_gguf`; `extra` may replace it, with `__` for dots."""
    config = model.config
    return {
        "general.name": "tiny",
        ".vocab_size": config.vocab_size,
        ".context_length": config.max_position_embeddings,
        ".block_count": config.num_hidden_layers,
        ".feed_forward_length": config.intermediate_size,
        ".embedding_length": config.hidden_size,
        ".attention.head_count": config.num_attention_heads,
        ".attention.head_count_kv": config.num_key_value_heads,
        ".attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        ".rope.dimension_count": config.hidden_size // config.num_attention_heads,
        ".rope.freq_base": float(config.rope_parameters["rope_theta"]),
        **{f".{key.replace('__', '.')}": value for key, value in extra.items()},
    }


def _interleaved(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of each head as pairs of rotated dimensions, as llama.cpp rotates them."""
    pairs = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape).contiguous()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], pre: str | None) -> None:
    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary = cast("dict[str, int]", tokenizer["model"]["vocab"])
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_pad_token_id(vocabulary["<|endoftext|>"])


def dequantised(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> Tensor:
    """The numbers that a tensor has after it was quantised, in fp32, by the package's own code."""
    blocks = gguf.quantize(tensor.detach().float().numpy(), kind)
    return torch.from_numpy(np.array(gguf.dequantize(blocks, kind)))
