"""Metadata of GGUF files that transformers leaves out; `test_gguf_tensors.py` has the scaling of models."""

from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from shopr1_service.errors import PolicyError
from shopr1_service.policy.gguf.config import complete_config


def completed(kind: str, architecture: str, config: dict[str, Any], **metadata: Any) -> PretrainedConfig:
    """A config after the file's metadata, with `__` for dots in keys."""
    made: PretrainedConfig = AutoConfig.for_model(kind, **config)
    keys = {f"{architecture}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    complete_config(made, {"general.architecture": architecture, **keys})
    return made


def test_gemma_3_scales_only_full_attention() -> None:
    """Hub configs of Gemma 3 from 4B on: factor 8 for full attention, none and base 10,000 for windows."""
    config = completed(
        *("gemma3_text", "gemma3", {}),
        rope__scaling__type="linear",
        rope__scaling__factor=8.0,
        rope__freq_base=1e6,
    )
    full, sliding = (config.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding"))
    assert (full["rope_type"], full["factor"], full["rope_theta"]) == ("linear", 8.0, 1e6)
    assert (sliding["rope_type"], sliding["rope_theta"]) == ("default", 10_000.0)


@pytest.mark.parametrize(
    ("kind", "architecture", "sizes", "expected"),
    [
        # hidden size, layers and heads of the hub's 27B; query_pre_attn_scalar of their configs
        ("gemma2", "gemma2", (4608, 46, 32), 144),
        ("gemma3_text", "gemma3", (5376, 62, 32), 168),
        ("gemma2", "gemma2", (3584, 42, 16), 256),
    ],
)
def test_scale_of_queries(kind: str, architecture: str, sizes: tuple[int, int, int], expected: int) -> None:
    hidden_size, num_layers, num_heads = sizes
    config = completed(
        *(kind, architecture),
        {"hidden_size": hidden_size, "num_hidden_layers": num_layers, "num_attention_heads": num_heads},
    )
    assert config.query_pre_attn_scalar == expected


def test_attributes() -> None:
    config = completed("gemma2", "gemma2", {}, attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (5.0, 3.0)
    assert completed("phi3", "phi3", {}, attention__sliding_window=2047).sliding_window == 2047
    assert completed("phi3", "phi3", {}, attention__sliding_window=0).sliding_window is None
    assert completed("falcon", "falcon", {}, attention__layer_norm_epsilon=1e-3).layer_norm_epsilon == 1e-3


def test_partial_rotation() -> None:
    config = completed("stablelm", "stablelm", {"partial_rotary_factor": 0.25}, rope__dimension_count=40)
    assert config.rope_parameters["partial_rotary_factor"] == 40 / (
        config.hidden_size // config.num_attention_heads
    )


def test_factor_of_1_scales_nothing() -> None:
    config = completed("llama", "llama", {}, rope__scaling__type="yarn", rope__scaling__factor=1.0)
    assert config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    "metadata",
    [
        {"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0},
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0},  # of which length?
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 2.0,
            "rope__scaling__original_context_length": 64,
            "rope__scaling__attn_factor": 1.5,
        },
    ],
)
def test_other_scaling_is_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="the GGUF file scales its rotary embedding"):
        completed("llama", "llama", {}, **metadata)


def test_scaling_that_contradicts_the_models_own_is_refused() -> None:
    own = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    metadata = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 2.0,
        "rope__scaling__original_context_length": 64,
    }
    with pytest.raises(PolicyError, match="it computes 'linear'"):
        completed("llama", "llama", own, **metadata)
