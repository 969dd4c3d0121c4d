"""GGUF files: RoPE factors against Llama 3's own formula, tensors without a place, and exact unpacking."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup
from shopr1_service.errors import PolicyError
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.policy.loading import load_policy
from shopr1_service.settings import Settings
from tests.support.gguf_files import dequantised, llama_metadata, llama_tensors, write_gguf
from tests.support.models import NUM_TOKENS, Reference, random_ids, rules, tiny_model

PROMPT, COMPLETION, MEASURED = random_ids(150, seed=1), random_ids(40, seed=2), range(40)
GROUP = TokenGroup(PromptKey(PROMPT), [CompletionTokens(COMPLETION, MEASURED)])
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def load(path: Path, **settings: Any) -> LoadedPolicy:
    return load_policy(Settings(policy=str(path), **{"dtype": "float32", "device": "cpu", **settings}))


def values(policy: LoadedPolicy) -> Sequence[float]:
    [[certainty]] = policy.certainties([GROUP], rules())
    assert isinstance(certainty, Certainty)
    return certainty.values


def expected(model: PreTrainedModel) -> list[float]:
    return Reference(model).values(PROMPT, COMPLETION, MEASURED, rules())


def llama3_factors(num_dimensions: int, parameters: dict[str, Any]) -> Tensor:
    """As llama.cpp's converter writes them for Llama 3.1 (`rope_freqs.weight`)."""
    original, scale = parameters["original_max_position_embeddings"], parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    factors = []
    for i in range(0, num_dimensions, 2):
        length = 2 * math.pi * parameters["rope_theta"] ** (i / num_dimensions)
        if length < original / high:
            factors.append(1.0)
        elif length > original / low:
            factors.append(scale)
        else:
            smooth = (original / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scale + smooth))
    return torch.tensor(factors)


# --- rotary embedding --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama", hidden_size=64)


def test_rope_factors_give_llama_3(tmp_path: Path, llama: PreTrainedModel) -> None:
    scaled = tiny_model("llama", hidden_size=64, rope_parameters=LLAMA3)
    factors = llama3_factors(16, LLAMA3)
    tensors = {**llama_tensors(llama), "rope_freqs.weight": factors}
    policy = load(write_gguf(tmp_path / "tiny.gguf", tensors, llama_metadata(llama)))
    assert policy.info.forward == "shared_prefix"
    assert values(policy) == pytest.approx(expected(scaled), abs=1e-4)
    assert max(factors) == 8
    assert values(policy) != pytest.approx(expected(llama), abs=1e-2)


def test_without_factors_nothing_is_scaled(tmp_path: Path, llama: PreTrainedModel) -> None:
    policy = load(write_gguf(tmp_path / "tiny.gguf", llama_tensors(llama), llama_metadata(llama)))
    assert values(policy) == pytest.approx(expected(llama), abs=1e-4)


SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({"rope__freq_base": 500.0}, {"rope_type": "default", "rope_theta": 500.0}),
    "linear": (
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    ),
    "old_linear": (
        {"rope__scale_linear": 4.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    ),
    "yarn": (
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 64,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10_000.0,
        },
    ),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaling_in_the_metadata(tmp_path: Path, llama: PreTrainedModel, kind: str) -> None:
    extra, parameters = SCALED[kind]
    scaled = tiny_model("llama", hidden_size=64, rope_parameters=parameters)
    policy = load(write_gguf(tmp_path / "tiny.gguf", llama_tensors(llama), llama_metadata(llama, **extra)))
    assert values(policy) == pytest.approx(expected(scaled), abs=1e-4)
    assert values(policy) != pytest.approx(expected(llama), abs=1e-2)


def test_scaling_that_is_not_read_is_refused(tmp_path: Path, llama: PreTrainedModel) -> None:
    metadata = llama_metadata(llama, rope__scaling__type="longrope", rope__scaling__factor=4.0)
    path = write_gguf(tmp_path / "tiny.gguf", llama_tensors(llama), metadata)
    with pytest.raises(PolicyError, match=r"llama\.rope\.scaling\.type.*longrope"):
        load(path)


def test_factors_of_another_head_are_refused(tmp_path: Path, llama: PreTrainedModel) -> None:
    tensors = {**llama_tensors(llama), "rope_freqs.weight": torch.ones(6)}
    path = write_gguf(tmp_path / "tiny.gguf", tensors, llama_metadata(llama))
    with pytest.raises(PolicyError, match=r"rope_freqs\.weight.*8 frequencies and the file 6 factors"):
        load(path)


# --- tensors without a place --------------------------------------------------------------------------


EXTRA = {
    "blk.0.attn_q.bias": torch.ones(64),
    "blk.2.attn_q.weight": torch.ones(64, 64),
    "rope_factors_long.weight": torch.ones(8),
}


@pytest.mark.parametrize("name", EXTRA)
def test_unused_tensor_is_refused(tmp_path: Path, llama: PreTrainedModel, name: str) -> None:
    tensors = {**llama_tensors(llama), name: EXTRA[name]}
    path = write_gguf(tmp_path / "tiny.gguf", tensors, llama_metadata(llama))
    with pytest.raises(PolicyError, match=f"would not compute with 1 tensors of the checkpoint: {name}"):
        load(path)
    assert values(load(path, ignored_tensors=(name,))) == pytest.approx(expected(llama), abs=1e-4)


# --- blocks ------------------------------------------------------------------------------------------

BLOCKS = gguf.GGMLQuantizationType.Q8_0


def test_blocks_are_rounded_once(tmp_path: Path) -> None:
    """LFM2's reader unpacks in the model's dtype; the numbers are the package's own, rounded to bf16."""
    options: dict[str, Any] = {"vocab_size": NUM_TOKENS, "block_auto_adjust_ff_dim": False}
    model = tiny_model("lfm2", layer_types=["conv", "full_attention"], **options)
    names = {
        "model.embed_tokens.": "token_embd.",
        "model.embedding_norm.": "token_embd_norm.",
        "model.layers.": "blk.",
        ".operator_norm.": ".attn_norm.",
        ".self_attn.q_proj.": ".attn_q.",
        ".self_attn.k_proj.": ".attn_k.",
        ".self_attn.v_proj.": ".attn_v.",
        ".self_attn.out_proj.": ".attn_output.",
        ".self_attn.q_layernorm.": ".attn_q_norm.",
        ".self_attn.k_layernorm.": ".attn_k_norm.",
        ".feed_forward.w1.": ".ffn_gate.",
        ".feed_forward.w3.": ".ffn_up.",
        ".feed_forward.w2.": ".ffn_down.",
        ".conv.conv.": ".shortconv.conv.",
        ".conv.in_proj.": ".shortconv.in_proj.",
        ".conv.out_proj.": ".shortconv.out_proj.",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor.squeeze(1) if "shortconv.conv." in name else tensor
    config = model.config
    metadata = {
        ".vocab_size": config.vocab_size,
        ".context_length": config.max_position_embeddings,
        ".embedding_length": config.hidden_size,
        ".feed_forward_length": config.intermediate_size,
        ".block_count": config.num_hidden_layers,
        ".attention.head_count": config.num_attention_heads,
        ".attention.head_count_kv": [0, config.num_key_value_heads],
        ".attention.layer_norm_rms_epsilon": float(config.norm_eps),
        ".shortconv.l_cache": config.conv_L_cache,
        ".rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    quantised = "blk.0.ffn_gate.weight"
    path = write_gguf(
        tmp_path / "tiny.gguf", tensors, metadata, architecture="lfm2", kinds={quantised: BLOCKS}
    )
    policy = load(path, dtype="bfloat16")
    weight = policy.model.get_parameter("model.layers.0.feed_forward.w1.weight")
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        weight.data, dequantised(tensors[quantised], BLOCKS).bfloat16(), rtol=0, atol=0
    )
