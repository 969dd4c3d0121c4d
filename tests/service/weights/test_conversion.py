"""Checkpoints as `save_pretrained` writes them, and as hubs and trainers have them, loaded by an update.

The reference is the model that was saved.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from shopr1_client.errors import InvalidWeightsError
from shopr1_service.weights.checkpoint import CheckpointDirectory
from shopr1_service.weights.conversion import KEY_MAPPING
from shopr1_service.weights.staging import StagedWeights
from shopr1_service.weights.tensors import Weights
from tests.support.models import FAMILIES, MIXTURES, MULTIMODAL, one_thread, random_ids, tiny_model
from tests.support.staging import check_equal, loaded, staged
from tests.support.updating import changed, changed_model, weights_of

KINDS = {name: (family.kind, dict(family.options)) for name, family in (FAMILIES | MIXTURES).items()}
QWEN_MOE = KINDS["qwen2_moe"]
EXPERT = "model.layers.0.mlp.experts.{}.{}_proj.weight"
IDS = torch.tensor([random_ids(21, seed=1)])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def update(model: PreTrainedModel, directory: Path) -> None:
    """Load a directory as an update does."""
    stage = StagedWeights(Weights(model), None, is_partial=False)
    checkpoint = CheckpointDirectory(str(directory), [directory])
    stage.refer(checkpoint.weights())
    stage.check()
    Weights(model).load(stage.locations, lambda: None)


def file_tensors(model: PreTrainedModel, directory: Path) -> dict[str, Tensor]:
    model.save_pretrained(directory)
    return safetensors.torch.load_file(directory / "model.safetensors")


def flaws(model: PreTrainedModel, tensors: Mapping[str, Tensor], **options: bool) -> dict[str, str]:
    with pytest.raises(InvalidWeightsError) as caught:
        staged(model, *tensors.items(), **{"is_partial": False, **options})
    return {each["location"]: each["message"] for each in caught.value.errors}


# --- save_pretrained --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_model_is_the_model(name: str, tmp_path: Path) -> None:
    kind, options = KINDS[name]
    sent, model = changed_model(kind=kind, **options), tiny_model(kind, **options)
    sent.save_pretrained(tmp_path)
    update(model, tmp_path)
    check_equal(model, sent)
    update(model, tmp_path)  # by a plan that does not know of the first
    check_equal(model, sent)


@pytest.mark.parametrize("name", KINDS)
def test_an_update_and_a_start_load_the_same(name: str, tmp_path: Path) -> None:
    kind, options = KINDS[name]
    changed_model(kind=kind, **options).save_pretrained(tmp_path)
    model = tiny_model(kind, **options)
    update(model, tmp_path)
    started = AutoModelForCausalLM.from_pretrained(tmp_path, key_mapping=dict(KEY_MAPPING))
    check_equal(model, started)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_of_experts(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, options = KINDS[name]
    sent, model = changed_model(kind=kind, **options), tiny_model(kind, **options)
    nn.Module.to(sent, dtype).save_pretrained(tmp_path)
    update(model, tmp_path)
    check_equal(model, nn.Module.to(sent, torch.float32))


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_multimodal_directory(name: str, tmp_path: Path) -> None:
    """The service starts from it with the whole model, or with its text part."""
    whole = MULTIMODAL[name]()
    whole.save_pretrained(tmp_path / "first")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    changed(whole).save_pretrained(tmp_path / "second")
    update(policy, tmp_path / "second")
    check_equal(policy, AutoModelForCausalLM.from_pretrained(tmp_path / "second"))
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
        torch.testing.assert_close(policy(input_ids=IDS).logits, expected)


# --- other layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "base_model.model._orig_mod."],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_prefixes(name: str, prefix: str, tmp_path: Path) -> None:
    kind, options = KINDS[name]
    sent, model = changed_model(kind=kind, **options), tiny_model(kind, **options)
    for tensors in (file_tensors(sent, tmp_path), weights_of(sent)):
        loaded(model, *((f"{prefix}{key}", tensor) for key, tensor in tensors.items()), is_partial=False)
        check_equal(model, sent)


def test_compiled_layers() -> None:
    sent, model = changed_model(), tiny_model()
    tensors = {
        key.replace("layers.1.", "layers.1._orig_mod."): tensor for key, tensor in weights_of(sent).items()
    }
    loaded(model, *tensors.items(), is_partial=False)
    check_equal(model, sent)


def test_gpt2_as_on_the_hub() -> None:
    """Without `transformer.`, and with the masks of attention."""
    kind, options = KINDS["gpt2"]
    sent, model = changed_model(kind=kind, **options), tiny_model(kind, **options)
    tensors = {
        key.removeprefix("transformer."): tensor
        for key, tensor in weights_of(sent).items()
        if key != "lm_head.weight"
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    tensors["h.1.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    loaded(model, *tensors.items(), is_partial=False)
    check_equal(model, sent)


def test_buffers_that_transformers_ignores() -> None:
    sent, model = changed_model(), tiny_model()
    tensors = weights_of(sent)
    frequencies = 1e4 ** -(torch.arange(4) / 4)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = frequencies.bfloat16()
    loaded(model, *tensors.items(), is_partial=False)
    check_equal(model, sent)


MASK = torch.ones(1, 1, 8, 8).tril()
CONSTANTS = {"attn.attention.bias": MASK, "attn.causal_mask": MASK, "attn.masked_bias": torch.tensor(-1e9)}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_former_versions(name: str) -> None:
    """As GPT-Neo, GPT-J and CodeGen have them on hubs; transformers warns of them."""
    kind, options = KINDS["gpt_neo"]
    sent, model = changed_model(kind=kind, **options), tiny_model(kind, **options)
    name = f"transformer.h.0.{name}"
    tensors = {**weights_of(sent), name: CONSTANTS[name.removeprefix("transformer.h.0.")]}
    loaded(model, *tensors.items(), is_partial=False)
    check_equal(model, sent)
    # These numbers are of no mask.
    assert flaws(tiny_model(kind, **options), {**tensors, name: torch.full((1, 1, 8, 8), 2.0)}).keys() == {
        name
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_a_state_dict_is_not_converted(name: str) -> None:
    kind, options = KINDS[name]
    sent, model = changed_model(kind=kind, **options), tiny_model(kind, **options)
    loaded(model, *weights_of(sent).items(), is_partial=False)
    check_equal(model, sent)


def test_some_layers(tmp_path: Path) -> None:
    kind, options = QWEN_MOE
    sent, model = changed_model(kind=kind, prefix="model.layers.1.", **options), tiny_model(kind, **options)
    tensors = file_tensors(sent, tmp_path)
    loaded(model, *((key, tensor) for key, tensor in tensors.items() if ".layers.1." in key))
    check_equal(model, sent)


# --- refusals ---------------------------------------------------------------------------------------


def test_an_expert_is_missing(tmp_path: Path) -> None:
    kind, options = QWEN_MOE
    tensors = file_tensors(tiny_model(kind, **options), tmp_path)
    del tensors[EXPERT.format(3, "down")]
    target = "model.layers.0.mlp.experts.down_proj"
    assert flaws(tiny_model(kind, **options), tensors) == {
        EXPERT.format(0, "down"): f"with 2 others it becomes {target}: its shape is [3, 32, 16],"
        " the policy's [4, 32, 16]"
    }


def test_experts_with_a_gap(tmp_path: Path) -> None:
    """Transformers would load the last expert in the place of the third."""
    kind, options = QWEN_MOE
    tensors = file_tensors(tiny_model(kind, **options), tmp_path)
    tensors[EXPERT.format(4, "down")] = tensors.pop(EXPERT.format(2, "down"))
    [(location, message)] = flaws(tiny_model(kind, **options), tensors).items()
    assert location == EXPERT.format(0, "down")
    assert message.startswith(
        "model.layers.0.mlp.experts.down_proj cannot be made: these are not the 4 tensors from 0 on"
    )


def test_a_part_of_a_fused_tensor_is_missing(tmp_path: Path) -> None:
    kind, options = QWEN_MOE
    tensors = file_tensors(tiny_model(kind, **options), tmp_path)
    for number in range(4):
        del tensors[EXPERT.format(number, "up")]
    [(location, message)] = flaws(tiny_model(kind, **options), tensors).items()
    assert location == EXPERT.format(0, "gate")
    target = "model.layers.0.mlp.experts.gate_up_proj"
    assert message == f"{target} cannot be made: there are no mlp.experts.*.up_proj.weight"


def test_all_of_a_converted_tensor_is_missing(tmp_path: Path) -> None:
    kind, options = QWEN_MOE
    tensors = file_tensors(tiny_model(kind, **options), tmp_path)
    kept = {key: tensor for key, tensor in tensors.items() if "layers.1.mlp.experts" not in key}
    names = [f"model.layers.1.mlp.experts.{part}_proj" for part in ("gate_up", "down")]
    assert flaws(tiny_model(kind, **options), kept) == dict.fromkeys(names, "it is missing")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e39])
def test_numbers_of_an_expert(value: float, tmp_path: Path) -> None:
    kind, options = QWEN_MOE
    tensors = file_tensors(tiny_model(kind, **options), tmp_path)
    name = EXPERT.format(2, "up")
    tensors[name] = tensors[name].double()
    tensors[name][3, 4] = value
    message = "values too large for torch.float32" if value == 1e39 else "NaN or infinite values"
    assert flaws(tiny_model(kind, **options), tensors) == {name: message}


def test_the_same_tensor_under_two_names() -> None:
    tensors = weights_of(tiny_model())
    name = "model.norm.weight"
    tensors[f"module.{name}"] = tensors[name] + 1
    assert flaws(tiny_model(), tensors) == {f"module.{name}": f"duplicate tensor: it is {name} again"}


def test_a_fused_tensor_and_its_parts(tmp_path: Path) -> None:
    kind, options = QWEN_MOE
    tensors = file_tensors(tiny_model(kind, **options), tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = weights_of(tiny_model(kind, **options))[name]
    assert flaws(tiny_model(kind, **options), tensors) == {
        name: f"duplicate tensor: {EXPERT.format(0, 'down')} is part of it"
    }


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "lm_head.modules_to_save.default.weight",
    ],
)
def test_tensors_of_peft(name: str) -> None:
    found = flaws(tiny_model(), {**weights_of(tiny_model()), name: torch.ones(2, 2)})
    assert found.keys() == {name}
    assert "send the adapter, or merged weights" in found[name]


def test_integers_are_no_weights() -> None:
    tensors: dict[str, Any] = weights_of(tiny_model())
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int64)
    assert flaws(tiny_model(), tensors) == {
        "model.norm.weight": "it is torch.int64, and the policy's has fractions"
    }
