"""RoPE modules whose frequencies depend on the length, against fresh modules of transformers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from shopr1_service.engine.lm_head import UnsupportedModelError, trunk_of
from shopr1_service.engine.rope_scaling import LengthDependentRope, has_length_dependent_rope
from tests.support.models import llama4, random_ids, shared_model, tiny_model

LIMIT = 32
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": LIMIT,
}
"""Both change at a length of 33 tokens."""


def model_with(rope: dict[str, Any], kind: str = "llama", **options: Any) -> PreTrainedModel:
    return tiny_model(kind, rope_parameters=rope, **{"max_position_embeddings": LIMIT, **options})


def module_of(model: PreTrainedModel) -> Any:
    return trunk_of(model).rotary_emb


def controlled(model: PreTrainedModel) -> LengthDependentRope:
    rope = LengthDependentRope.of(model)
    assert rope is not None
    return rope


def rotate(module: nn.Module, first: int, end: int) -> tuple[Tensor, Tensor]:
    cos_sin: tuple[Tensor, Tensor] = module(torch.zeros(1), torch.arange(first, end)[None])
    return cos_sin


@pytest.mark.parametrize("scaling", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 34, 100])
def test_a_part_of_a_sequence_is_rotated_as_in_the_whole(scaling: dict[str, Any], num_tokens: int) -> None:
    model = model_with(scaling)
    whole = rotate(copy.deepcopy(module_of(model)), 0, num_tokens)
    rope = controlled(model)
    rotate(module_of(model), 0, 200)  # a longer sequence came before
    for first, end in ((0, num_tokens), (0, 1), (num_tokens // 2, num_tokens)):
        with rope.pinned(num_tokens):
            part = rotate(module_of(model), first, end)
        for actual, expected in zip(part, whole, strict=True):
            assert torch.equal(actual, expected[:, first:end])


@pytest.mark.parametrize("scaling", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
def test_a_forward_of_its_own_is_that_of_a_fresh_model(scaling: dict[str, Any]) -> None:
    model = model_with(scaling)
    untouched = copy.deepcopy(model)
    controlled(model)
    for num_tokens in (20, 80, 20, 33, 32, 31, 100, 31):
        ids = torch.tensor([random_ids(num_tokens)])
        with torch.no_grad():
            expected = copy.deepcopy(untouched)(input_ids=ids, use_cache=False).logits
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


def test_representatives() -> None:
    rope = controlled(model_with(DYNAMIC))
    first = rope.representative(1)
    assert {rope.representative(num) for num in (2, 5, 31, 32)} == {first}
    assert [rope.representative(num) for num in (33, 34, 100, 33)] == [33, 34, 100, 33]
    assert [rope.is_shared(num) for num in (1, 2, 32, 33, 34)] == [True, True, True, False, False]

    rope = controlled(model_with(LONG))
    assert rope.representative(32) == rope.representative(1)
    assert rope.representative(33) == rope.representative(10**6) != rope.representative(1)
    assert all(map(rope.is_shared, (1, 32, 33, 34)))


def test_equal_factors_are_one_set_of_frequencies() -> None:
    rope = controlled(model_with({**LONG, "long_factor": LONG["short_factor"]}))
    assert rope.representative(100) == rope.representative(2)


def test_scales_count_too() -> None:
    """Phi-3.5-MoE rotates by the same frequencies at every length, but scales them by another factor."""
    scaling = {**LONG, "long_factor": LONG["short_factor"], "short_mscale": 1.0, "long_mscale": 1.5}
    model = model_with(scaling, "phimoe", num_local_experts=2, original_max_position_embeddings=LIMIT)
    rope = controlled(model)
    assert rope.representative(32) == rope.representative(1) != rope.representative(33)


def test_kinds_of_layers_with_different_rope() -> None:
    static = {"rope_type": "default", "rope_theta": 1e4}
    model = model_with(
        {"sliding_attention": static, "full_attention": DYNAMIC},
        "gemma3_text",
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    rope = controlled(model)
    assert rope.representative(33) == 33
    with rope.pinned(33):
        cos, _ = module_of(model)(torch.zeros(1), torch.arange(20)[None], "full_attention")
    assert cos.shape == (1, 20, 8)


def test_positions_of_several_axes() -> None:
    """Multimodal RoPE has positions for time, height and width."""
    rope = controlled(model := model_with(DYNAMIC))
    module_of(model).forward = lambda _x, position_ids: (position_ids[..., None], position_ids[..., None])
    with rope.pinned(100):
        cos, _ = module_of(model)(torch.zeros(1), position_ids=torch.arange(20).expand(3, 2, 20))
    assert cos.shape == (3, 2, 20, 1)


def test_complex_rotations() -> None:
    """Llama 4 rotates by complex numbers."""
    rope = controlled(model := llama4(rope_parameters=DYNAMIC, max_position_embeddings=LIMIT))
    with rope.pinned(100):
        frequencies = module_of(model)(torch.zeros(1), torch.arange(20)[None])
    assert frequencies.is_complex()
    assert frequencies.shape == (1, 20, 4)


@pytest.mark.parametrize(
    "model",
    [
        lambda: shared_model("llama"),
        lambda: shared_model("gpt2"),
        lambda: shared_model("mamba2"),
        lambda: model_with({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        lambda: model_with({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        # Labelled `dynamic`, but a fixed `alpha` makes the frequencies static.
        lambda: model_with({**DYNAMIC, "alpha": 1000.0}, "hunyuan_v1_dense", head_dim=8),
    ],
)
def test_static_frequencies_need_no_control(model: Any) -> None:
    assert LengthDependentRope.of(model()) is None
    assert not has_length_dependent_rope(model())


def test_modules_that_cannot_be_controlled_are_refused() -> None:
    model = model_with(DYNAMIC)
    module_of(model).forward = lambda _x, _positions, _frames: None
    message = "the RoPE of LlamaRotaryEmbedding depends on the sequence's length in an unknown way"
    with pytest.raises(UnsupportedModelError, match=message):
        LengthDependentRope.of(model)


def test_a_copy_of_the_model_is_controlled_alone() -> None:
    model = model_with(DYNAMIC)
    rope = controlled(model)
    duplicate = copy.deepcopy(model).double()
    with rope.pinned(100):
        own = rotate(module_of(duplicate), 0, 20)
    assert_close(own, rotate(module_of(model_with(DYNAMIC)), 0, 20))
