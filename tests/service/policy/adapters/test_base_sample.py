"""Adapters of models whose base weights are not the policy's are refused."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from shopr1_client import Client
from shopr1_client.errors import InvalidWeightsError
from shopr1_client.wire_policy import BASE_SAMPLE_KEY
from shopr1_service.policy.adapters.base_sample import check_base
from shopr1_service.policy.adapters.lora_config import AdapterError
from tests.support.client_updates import with_client
from tests.support.http import WAIT_S, served
from tests.support.models import FAMILIES, MIXTURES, one_thread, policy_of, tiny_model
from tests.support.updating import changed_model

peft: Any = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def adapted(base: Any, **options: Any) -> Any:
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **options})
    return peft.get_peft_model(base, config)


@torch.no_grad()
def with_norms_trained_before() -> Any:
    """And frozen again: their `requires_grad` tells nothing."""
    model = adapted(tiny_model())
    model.get_submodule("base_model.model.model.layers.1.input_layernorm").weight.add_(1e-4)
    return model


@torch.no_grad()
def with_a_base_layer_trained() -> Any:
    model = adapted(tiny_model())
    model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer").weight.add_(1e-4)
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (with_norms_trained_before, NORM),
        (with_a_base_layer_trained, "model.layers.0.self_attn.q_proj.weight"),
        (lambda: adapted(changed_model()), "model.embed_tokens.weight"),
        (lambda: adapted(tiny_model(vocab_size=400)), "model.embed_tokens.weight"),
    ],
    ids=["norm", "base layer", "another model", "another vocabulary"],
)
def test_another_base_is_refused(make: Callable[[], Any], name: str) -> None:
    with served(policy_of(tiny_model())) as url:
        with pytest.raises(InvalidWeightsError, match="has other weights here than the policy") as caught:
            with_client(url, make(), "1")
        with_client(url, adapted(tiny_model()), "2")
    assert [each["location"] for each in caught.value.errors] == [name]


def test_the_base_is_the_newest_version() -> None:
    with served(policy_of(tiny_model())) as url, Client(url, timeout_s=WAIT_S) as client:
        client.update_policy(changed_model(), "1")
        client.update_policy(adapted(changed_model()), "2")
        with pytest.raises(InvalidWeightsError):
            client.update_policy(adapted(tiny_model()), "3")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_of_the_same_base(dtype: torch.dtype) -> None:
    with served(policy_of(tiny_model())) as url:
        with_client(url, adapted(nn.Module.to(tiny_model(), dtype)), "1")
        with pytest.raises(InvalidWeightsError):
            with_client(url, adapted(nn.Module.to(changed_model(), dtype)), "2")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom"])
def test_other_families(name: str) -> None:
    family = FAMILIES[name]
    modules = ["c_attn", "query_key_value"]
    with served(policy_of(tiny_model(family.kind, **family.options))) as url:
        model = adapted(tiny_model(family.kind, **family.options), target_modules=modules)
        with_client(url, model, "1")


def test_experts() -> None:
    family = MIXTURES["qwen2_moe"]
    with served(policy_of(tiny_model(family.kind, **family.options))) as url:
        with_client(url, adapted(tiny_model(family.kind, **family.options)), "1")


def test_a_sample_that_is_none() -> None:
    for text in ("", "[]", '{"a": 1}', '{"a": {"dtype": "F32", "shape": [2], "step": 0, "values": []}}'):
        with pytest.raises(AdapterError) as caught:
            check_base(tiny_model(), text)
        assert caught.value.location == BASE_SAMPLE_KEY


def test_tensors_that_the_policy_lacks() -> None:
    check_base(tiny_model(), '{"other": {"dtype": "F32", "shape": [2], "step": 1, "values": [1, 2]}}')
