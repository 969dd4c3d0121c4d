"""Adapters that cannot be applied, each with the tensor that is at fault."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shopr1_service.policy.adapters.lora import AdapterError, build_adapter
from shopr1_service.policy.adapters.lora_config import LoraConfig
from tests.support.models import model_of, tiny_model

CONFIG = LoraConfig(peft_type="LORA", r=3, lora_alpha=6.0)
PREFIX = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model()


def refusal(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], config: LoraConfig = CONFIG
) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        build_adapter(model, config, tensors)
    return caught.value


def pair(module: str, num_outputs: int = 32, num_inputs: int = 32, r: int = 3) -> dict[str, Tensor]:
    shapes = {"A": (r, num_inputs), "B": (num_outputs, r)}
    return {f"{PREFIX}{module}.lora_{side}.weight": torch.ones(shape) for side, shape in shapes.items()}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("lm_head", "the head"),
        ("model.embed_tokens", "this is Embedding; push full weights"),
        ("model.norm", "this is LlamaRMSNorm"),
        ("model.layers.0", "this is LlamaDecoderLayer"),
        ("model.layers.2.self_attn.q_proj", "no module 'model.layers.2.self_attn.q_proj'"),
        ("blocks.0.self_attn.q_proj", "no module 'blocks.0.self_attn.q_proj'"),
        (f"{Q_PROJ}.base_layer", "no module"),
    ],
)
def test_modules_that_cannot_be_adapted(model: PreTrainedModel, module: str, message: str) -> None:
    error = refusal(model, pair(module))
    assert error.location == f"{PREFIX}{module}.lora_A.weight"
    assert message in error.message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.embed_tokens.lora_embedding_A", "embeddings"),
        (f"{Q_PROJ}.lora_magnitude_vector.weight", "DoRA"),
        (f"{Q_PROJ}.lora_B.bias", "only lora_A.weight"),
        ("lm_head.weight", "push full weights"),
        (f"{Q_PROJ}.lora_C.weight", "only lora_A.weight"),
        ("", "only lora_A.weight"),
    ],
)
def test_tensors_that_are_not_understood(model: PreTrainedModel, name: str, message: str) -> None:
    error = refusal(model, {**pair(Q_PROJ), name: torch.ones(3, 32)})
    assert error.location == name
    assert message in error.message


@pytest.mark.parametrize("missing", ["A", "B"])
def test_half_a_layer(model: PreTrainedModel, missing: str) -> None:
    halves = {name: tensor for name, tensor in pair(Q_PROJ).items() if f"lora_{missing}" not in name}
    error = refusal(model, halves)
    assert [error.location] == list(halves)
    assert "the other half is missing" in error.message


def test_no_tensors(model: PreTrainedModel) -> None:
    assert refusal(model, {}).location == "tensors"


def test_twice_the_same(model: PreTrainedModel) -> None:
    name = f"{Q_PROJ}.lora_A.weight"
    assert refusal(model, {**pair(Q_PROJ), name: torch.ones(3, 32)}).location == name


def test_two_adapters_in_a_file(model: PreTrainedModel) -> None:
    o_proj = pair(Q_PROJ.replace("q_proj", "o_proj"))
    other = {name.replace(".weight", ".other.weight"): tensor for name, tensor in o_proj.items()}
    assert refusal(model, {**pair(Q_PROJ), **other}).location == next(iter(other))


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "r", "side"),
    [(32, 31, 3, "A"), (31, 32, 3, "B"), (32, 32, 4, "A"), (32, 32, 2, "A"), (32, 0, 3, "A")],
)
def test_shapes(model: PreTrainedModel, num_outputs: int, num_inputs: int, r: int, side: str) -> None:
    error = refusal(model, pair(Q_PROJ, num_outputs, num_inputs, r))
    assert error.location == f"{PREFIX}{Q_PROJ}.lora_{side}.weight"
    assert ("[3, 32]" if side == "A" else "[32, 3]") in error.message


def test_shapes_of_conv1d() -> None:
    # GPT-2's c_attn maps 32 to 96, and keeps its weight as [32, 96].
    model = model_of("gpt2")
    name = "transformer.h.0.attn.c_attn"
    assert build_adapter(model, CONFIG, pair(name, 96, 32)).layers[name].b_O_R.shape == (96, 3)
    assert refusal(model, pair(name, 32, 96)).location == f"{PREFIX}{name}.lora_A.weight"


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (math.nan, torch.float32),
        (math.inf, torch.bfloat16),
        (-math.inf, torch.float64),
        (1e300, torch.float64),  # infinite in fp32, which it is used in
    ],
)
def test_values_that_are_not_finite(
    model: PreTrainedModel, side: str, value: float, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in pair(Q_PROJ).items()}
    name = f"{PREFIX}{Q_PROJ}.lora_{side}.weight"
    tensors[name][1, 2] = value
    error = refusal(model, tensors)
    assert (error.location, "not finite" in error.message) == (name, True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool, torch.complex64])
def test_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    error = refusal(model, {name: tensor.to(dtype) for name, tensor in pair(Q_PROJ).items()})
    assert (error.location, str(dtype) in error.message) == (f"{PREFIX}{Q_PROJ}.lora_A.weight", True)


def test_quantised_layers(model: PreTrainedModel) -> None:
    module = model.get_submodule(Q_PROJ)
    module.weight = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    assert "quantised" in refusal(model, pair(Q_PROJ)).message
