"""Constants of former versions of transformers: left out if they are the model's, refused if they are not."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from shopr1_client.errors import InvalidWeightsError
from shopr1_service.weights.constants import contradiction, is_constant
from tests.support.models import model_of, tiny_model
from tests.support.staging import staged
from tests.support.updating import weights_of

PER_LAYER = "model.layers.0.self_attn.rotary_emb.inv_freq"
"""Llama's, before its layers shared them."""


def frequencies(theta: float, num_pairs: int = 4) -> Tensor:
    """θ^(−i/num_pairs)."""
    return theta ** -(torch.arange(num_pairs, dtype=torch.float64) / num_pairs)


def llama(theta: float = 1e4, **rope: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": theta, **rope}
    return tiny_model("llama", rope_parameters=rope)


def test_names() -> None:
    assert is_constant(PER_LAYER)
    assert is_constant("transformer.h.0.attn.bias")
    assert is_constant("model.embed_positions.weights")
    assert not is_constant("model.embed_positions.weight")
    assert not is_constant("model.layers.0.self_attn.q_proj.bias")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_frequencies_up_to_rounding(dtype: torch.dtype, theta: float) -> None:
    model = llama(theta)
    assert contradiction(model, PER_LAYER, frequencies(theta).to(dtype)) is None
    # In bfloat16, 2 % are at least two steps.
    for other in (frequencies(theta * 1.1), frequencies(theta, 8)[:4], frequencies(theta) * 1.02):
        assert "rotary frequencies" in str(contradiction(model, PER_LAYER, other.to(dtype)))


@pytest.mark.parametrize(
    "given",
    [
        torch.full((4,), math.nan),
        torch.ones(4, dtype=torch.int64),
        torch.ones(()),
        frequencies(1e4, 8),
        frequencies(1e4)[:3],
    ],
)
def test_tensors_that_are_no_frequencies_of_this_model(given: Tensor) -> None:
    assert contradiction(llama(), PER_LAYER, given) is not None


def test_linear_scaling_was_once_one_of_positions() -> None:
    model = llama(rope_type="linear", factor=4.0)
    for scale in (1.0, 0.25):
        assert contradiction(model, PER_LAYER, frequencies(1e4) * scale) is None
    assert contradiction(model, PER_LAYER, frequencies(1e4) / 2) is not None


def test_one_of_several_rotations() -> None:
    """Gemma 3 rotates by other frequencies in layers with a window."""
    model = model_of("gemma3")
    own = {name: each for name, each in model.named_buffers() if name.endswith("inv_freq")}
    assert len(own) > 1
    for name, each in own.items():
        assert contradiction(model, PER_LAYER, each) is None
        assert contradiction(model, name, each) is None
        assert contradiction(model, name, each * 2) is not None


# --- masks and positions ----------------------------------------------------------------------------


def causal(num_positions: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(1, 1, num_positions, num_positions, dtype=torch.bool).tril().to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["transformer.h.0.attn.bias", "transformer.h.0.attn.causal_mask"])
def test_causal_masks(name: str, dtype: torch.dtype) -> None:
    model = llama()
    assert contradiction(model, name, causal(8, dtype)) is None
    window = causal(8, dtype).bool() ^ causal(8).bool().tril(-3)
    for other in (torch.ones(1, 1, 8, 8), window, torch.zeros(8), torch.zeros(()), causal(8)[..., :4]):
        assert "causal mask" in str(contradiction(model, name, other.to(dtype)))


def test_masks_of_logits() -> None:
    mask = torch.full((1, 1, 8, 8), -1e4).triu(1)
    assert contradiction(llama(), "h.0.attn.causal_mask", mask) is None
    assert contradiction(llama(), "h.0.attn.causal_mask", mask * 0.5) is not None
    assert contradiction(llama(), "h.0.attn.masked_bias", torch.tensor(-1e4, dtype=torch.bfloat16)) is None
    for value in (-1.0, 0.0, math.nan):
        assert contradiction(llama(), "h.0.attn.masked_bias", torch.tensor(value)) == "it does not mask"


def test_window_of_gpt_neo() -> None:
    model = model_of("gpt_neo")
    own = {name: each for name, each in model.named_buffers() if name.endswith("attention.bias")}
    is_local = [not torch.equal(each, causal(each.shape[-1]).bool()) for each in own.values()]
    assert any(is_local)
    for name, each in own.items():
        assert contradiction(model, name, each.float()) is None
        assert contradiction(model, name, each[..., :4, :4]) is None
        assert contradiction(model, name, ~each) is not None


def test_vector_of_the_same_name_is_no_mask() -> None:
    """A bias that the config denies."""
    assert contradiction(llama(), "model.layers.0.attention.bias", torch.zeros(32)) is not None


def test_positions() -> None:
    name = "model.position_ids"
    assert contradiction(llama(), name, torch.arange(9).expand(1, 9)) is None
    for other in (torch.arange(1, 9), torch.zeros(3), torch.tensor(0)):
        assert contradiction(llama(), name, other) == "these are not the positions from 0 on"


def test_sines() -> None:
    model = tiny_model("xglm", d_model=32, attention_heads=4, num_layers=1, ffn_dim=48)
    [(name, own)] = [(name, each) for name, each in model.named_buffers() if name.endswith(".weights")]
    assert contradiction(model, name, own) is None
    assert contradiction(model, name, own[:7].half()) is None
    for other in (own.roll(1, 0), own[:, :4], torch.zeros_like(own)):
        assert contradiction(model, name, other) is not None
    assert contradiction(llama(), name, own) is not None


# --- updates ----------------------------------------------------------------------------------------


def test_constant_of_another_config_is_refused_in_an_update() -> None:
    model = llama()
    tensors = weights_of(model)
    right, wrong = (frequencies(theta).float() for theta in (1e4, 5e5))
    assert staged(model, *{**tensors, PER_LAYER: right}.items(), is_partial=False).keys() == tensors.keys()
    with pytest.raises(InvalidWeightsError) as caught:
        staged(model, *{**tensors, PER_LAYER: wrong}.items(), is_partial=False)
    assert [each["location"] for each in caught.value.errors] == [PER_LAYER]


def test_constants_that_the_models_own_rule_ignores() -> None:
    """GPT-2's class names its masks."""
    model = model_of("gpt2")
    tensors = {**weights_of(model), "transformer.h.0.attn.bias": torch.zeros(3)}
    assert staged(model, *tensors.items(), is_partial=True).keys() <= weights_of(model).keys()
