"""Classes that compute a checkpoint's logits: images and text against fp64, and refusals by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup
from shopr1_service.errors import PolicyError
from shopr1_service.policy.architectures import auto_class
from shopr1_service.policy.loading import load_policy
from shopr1_service.settings import Settings
from tests.support.models import NUM_ROWS, Reference, byte_level, disturb, random_ids, rules

TEXT = {
    "vocab_size": NUM_ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 4,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
_LLAMA4 = {
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "attention_chunk_size": 8,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
}
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", "projection_dim": 32}),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral"}),
    "qwen2_vl": (_MROPE, {}),
    "qwen2_5_vl": (_MROPE, {"out_hidden_size": 32}),
    "qwen3_vl": (_MROPE, {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}),
    "internvl": (
        {"model_type": "qwen2"},
        {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]},
    ),
    "glm4v": (
        {"rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
        {"out_hidden_size": 32},
    ),
    "lfm2_vl": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        {"model_type": "siglip2_vision_model"},
    ),
    "llama4": (
        _LLAMA4,
        {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "mllama": (
        {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {
            "num_global_layers": 1,
            "attention_heads": 4,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
    ),
}


def multimodal(kind: str) -> PreTrainedModel:
    text, vision = MULTIMODAL[kind]
    parts = {"text_config": {**TEXT, **text}, "vision_config": {**VISION, **vision}}
    config = AutoConfig.for_model(kind, **parts, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        disturb(model)
    model.train(False)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_images_and_text(tmp_path: Path, kind: str) -> None:
    model = multimodal(kind)
    model.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    policy = load_policy(Settings(policy=str(tmp_path), dtype="float32", device="cpu"))  # type: ignore[arg-type]
    assert policy.info.architecture == type(model).__name__
    assert policy.info.forward != "independent"
    prompt_ids, ids = random_ids(40, seed=1), random_ids(12, seed=2)
    group = TokenGroup(PromptKey(prompt_ids), [CompletionTokens(ids, range(12))])
    [[certainty]] = policy.certainties([group], rules())
    assert isinstance(certainty, Certainty)
    expected = Reference(model).values(prompt_ids, ids, range(12), rules())
    assert certainty.values == pytest.approx(expected, abs=1e-4)


def test_text_class_that_reads_the_text_part() -> None:
    config = AutoConfig.for_model("qwen3_5")
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    assert auto_class(config) is AutoModelForCausalLM


def test_class_that_the_checkpoint_names() -> None:
    config = AutoConfig.for_model("llama4")
    config.architectures = ["Llama4ForConditionalGeneration"]
    assert auto_class(config) is AutoModelForMultimodalLM
    config.architectures = ["Llama4ForCausalLM"]
    assert auto_class(config) is AutoModelForCausalLM


REFUSED = {
    "blt": "it predicts bytes from patches",
    "prophetnet": "it predicts several next tokens",
    "xlnet": "each token sees those after it",
    "xmod": "set default_language in its config.json",
    "t5": "is no causal language model: an encoder reads its input",
    "udop": "is no causal language model: an encoder reads its input",
    "clip": "is not a causal language model",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str) -> None:
    with pytest.raises(PolicyError, match=f"architecture '{kind}' .*{REFUSED[kind]}"):
        auto_class(AutoConfig.for_model(kind))
