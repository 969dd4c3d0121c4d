"""Lengths that configs name, against the architectures' own descriptions of them."""

from typing import Any

import pytest

from shopr1_service.engine.forward.reach import Reach
from tests.support.models import FAMILIES, tiny_model

MIXED = ["sliding_attention", "full_attention"]
FULL = ["full_attention", "full_attention"]
DEEPSEEK = FAMILIES["deepseek_v3"].options


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("llama", {}, Reach(0)),
        ("mistral", {"sliding_window": 40}, Reach(40)),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 40}, Reach(0)),
        (
            "qwen3",
            {"head_dim": 8, "use_sliding_window": True, "sliding_window": 40, "layer_types": MIXED},
            Reach(40),
        ),
        (
            "qwen3",
            {"head_dim": 8, "use_sliding_window": True, "sliding_window": 40, "layer_types": FULL},
            Reach(0),
        ),
        ("gpt_neo", {**FAMILIES["gpt_neo"].options, "window_size": 40}, Reach(40)),
        ("mamba2", {**FAMILIES["mamba2"].options, "chunk_size": 40}, Reach(40)),
        ("bamba", {**FAMILIES["bamba"].options, "mamba_chunk_size": 40}, Reach(40)),
        ("qwen3_next", FAMILIES["qwen3_next"].options, Reach(64)),  # chunks of its delta rule
        ("big_bird", {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}, Reach(28)),
        ("big_bird", {"attention_type": "original_full", "block_size": 4}, Reach(4)),
        ("doge", {"keep_window_size": 40}, Reach(240, num_chosen=40)),
        ("deepseek_v32", {**DEEPSEEK, "index_topk": 40, "index_head_dim": 16}, Reach(240, num_chosen=40)),
        (
            "minimax_m3_vl_text",
            {
                "index_topk_blocks": 5,
                "index_block_size": 8,
                "head_dim": 16,
                "rotary_dim": 8,
                "num_local_experts": 4,
            },
            Reach(240, num_chosen=40),
        ),
    ],
)
def test_reach(kind: str, options: dict[str, Any], expected: Reach) -> None:
    assert Reach.of(tiny_model(kind, **options)) == expected


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 2.0}, None),
        ({"rope_type": "dynamic", "factor": 2.0}, 512),  # max_position_embeddings
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}, 64),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [3.0] * 4,
                "original_max_position_embeddings": 16,
            },
            16,
        ),
    ],
)
def test_rope_changes_from_a_length_on(rope: dict[str, Any], expected: int | None) -> None:
    model = tiny_model("llama", rope_parameters={"rope_theta": 1e4, **rope})
    assert Reach.of(model) == Reach(expected or 0, rope_threshold=expected)


def test_rope_that_no_sequence_changes_is_static() -> None:
    rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope)  # up to 512 tokens
    assert Reach.of(model, 512) == Reach(0)
    assert Reach.of(model, 513) == Reach(512, rope_threshold=512)
    # Labelled `dynamic`, but with a fixed base.
    model = tiny_model("hunyuan_v1_dense", rope_parameters={**rope, "alpha": 1000.0}, head_dim=8)
    assert Reach.of(model) == Reach(0)


def test_compressed_keys_are_chosen_by_rate() -> None:
    model = tiny_model()
    for name, value in {"index_topk": 10, "compress_rates": {"fine": 4, "coarse": 32}}.items():
        setattr(model.config, name, value)
    assert Reach.of(model) == Reach(240, num_chosen=40)
    model.config.compress_rates["coarse"] = 300
    assert Reach.of(model) == Reach(300, num_chosen=40)
