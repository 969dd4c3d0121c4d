"""Adapters that PEFT wrote are applied as PEFT applies them, to the last bit, or refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from shopr1_service.policy.lora import AdapterError, build_adapter, parse_config
from tests.support.models import one_thread, random_ids, tiny_model

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
