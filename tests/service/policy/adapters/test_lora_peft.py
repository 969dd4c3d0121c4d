"""Adapters that PEFT wrote are applied as PEFT applies them, to the last bit, or refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from shopr1_service.core import Version
from shopr1_service.memory.budget import Account, MemoryBudget
from shopr1_service.policy.adapters.lora import AdapterError, build_adapter, parse_config
from tests.support.models import MIXTURES, MULTIMODAL, one_thread, policy_of, random_ids, tiny_model

PREFIX = "base_model.model."
IDS = random_ids(21, seed=1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def saved_by_peft(peft: Any, directory: Path, kind: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """PEFT's model, loaded from an adapter that PEFT has written."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    made = peft.get_peft_model(tiny_model(kind, dtype), config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(directory)
    return peft.PeftModel.from_pretrained(tiny_model(kind, dtype), directory)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}),
        (
            "llama",
            {"target_modules": "all-linear", "r": 4, "use_rslora": True, "init_lora_weights": "orthogonal"},
        ),
        (
            "llama",
            {
                "target_modules": "all-linear",
                "r": 5,
                "lora_dropout": 0.3,
                "rank_pattern": {r"layers\.0\..*": 3, "o_proj": 7, "q_proj": 2},
                "alpha_pattern": {"^model.layers.1.mlp.up_proj": 3, "layers.*k_proj": 32},
            },
        ),
        ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "r": 4, "fan_in_fan_out": True}),
    ],
    ids=["plain", "rslora", "patterns", "conv1d"],
)
def test_peft_gives_the_same(tmp_path: Path, kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    theirs = saved_by_peft(peft, tmp_path, kind, dtype, options).eval()
    model = tiny_model(kind, dtype)
    config = parse_config((tmp_path / "adapter_config.json").read_bytes())
    adapter = build_adapter(model, config, load_file(tmp_path / "adapter_model.safetensors"))
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        base = model(input_ids=ids).logits
        with adapter.applied(model):
            actual = model(input_ids=ids).logits
        expected = theirs(input_ids=ids).logits
    assert_close(actual, expected, rtol=0, atol=0)
    assert (expected - base).abs().max() > 0.1
    assert {name: layer.a_R_I.dtype for name, layer in adapter.layers.items()} == {
        name.removeprefix(PREFIX): module.lora_A["default"].weight.dtype
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("modules", ["all-linear", r".*layers\.\d+\..*(q_proj|in_proj_qkv|down_proj)"])
@pytest.mark.parametrize("name", MULTIMODAL)
def test_adapters_of_a_multimodal_model(name: str, modules: str, tmp_path: Path) -> None:
    """The policy has the whole model, or its text part only; the vision tower's adapters do not matter."""
    peft = pytest.importorskip("peft")
    whole = MULTIMODAL[name]()
    whole.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=modules, rank_pattern={"language_model.*down_proj": 3})
    theirs = peft.get_peft_model(whole, config)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    policy = policy_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    adapter = build_adapter(
        policy.model,
        parse_config((tmp_path / "adapter" / "adapter_config.json").read_bytes()),
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
    )
    assert {layer.a_R_I.shape[0] for layer in adapter.layers.values()} == {3, 4}
    memory = MemoryBudget().hold(Account.ADAPTERS)
    policy.add_adapter(adapter, Version("1", 1, "mine"), max_kept=1, is_default=False, memory=memory)
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        with adapter.applied(policy.model):
            actual = policy.model(input_ids=ids).logits
        assert_close(actual, theirs.eval()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_model_without_its_head(tmp_path: Path) -> None:
    """Its modules have no `model.`, which transformers adds to names of weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    theirs = tiny_model()
    theirs.model = peft.get_peft_model(theirs.model, config)
    theirs.model.save_pretrained(tmp_path)
    model = tiny_model()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert f"{PREFIX}layers.0.self_attn.q_proj.lora_A.weight" in tensors
    adapter = build_adapter(model, parse_config((tmp_path / "adapter_config.json").read_bytes()), tensors)
    ids = torch.tensor([IDS])
    with torch.inference_mode(), adapter.applied(model):
        assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_stacked_expert() -> None:
    family = MIXTURES["mixtral"]
    name = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(48, 2)}
    config = parse_config('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with pytest.raises(AdapterError, match=r"it is a part of model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        build_adapter(tiny_model(family.kind, **family.options), config, tensors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [5]},
        {"layer_replication": [[0, 2], [1, 2]]},
    ],
    ids=lambda options: "-".join(f"{key}" for key in options),
)
def test_adapters_of_peft_that_cannot_be_applied(tmp_path: Path, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **options})
    peft.get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError):
        build_adapter(
            tiny_model(),
            parse_config((tmp_path / "adapter_config.json").read_bytes()),
            load_file(tmp_path / "adapter_model.safetensors"),
        )
