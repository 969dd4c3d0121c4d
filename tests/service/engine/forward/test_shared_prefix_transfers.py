"""A pass does not wait for the device in each layer. Counted on PyTorch's `meta` device, which has no data.

An operation that reads a number of the device on the host (`.item()`, `nonzero`, a truth value) raises there,
where it would wait on CUDA. Copies from the host are counted.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from shopr1_service.engine.attention import kernels
from shopr1_service.engine.forward.base import PromptGroup, Suffix
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.prefix_cache import PrefixCache
from tests.support.models import FAMILIES, random_ids, shared_model

META = torch.device("meta")
NUM_COPIES = 16
"""Two passes, each with its ids and positions; three lists of places for each of three lengths of segments;
the measured tokens of two completions; and the positions of tokens whose window cuts the prefix."""


class CopiesFromHost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that read a tensor of the CPU and return one of the device."""

    count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, made = (
            {t.device.type for t in tree_leaves(x) if isinstance(t, Tensor)} for x in (args, result)
        )
        self.count += "cpu" in read and "meta" in made
        return result


def on_meta(family: str, factor: int) -> PreTrainedModel:
    """The family's model without data, with so many times its layers."""
    config = copy.deepcopy(shared_model(family).config)
    config.num_hidden_layers *= factor
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types * factor
    with META:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.train(False)
    return model


def num_copies(family: str, factor: int) -> int:
    forward = SharedPrefixForward(on_meta(family, factor), PrefixCache(2**30))
    suffixes = [Suffix(random_ids(12, seed=2), [0, 11]), Suffix(random_ids(20, seed=3), [8])]
    copies = CopiesFromHost()  # type: ignore[no-untyped-call]
    with copies:
        states = forward.batch([PromptGroup(random_ids(40, seed=1), suffixes)])
    assert [tuple(each.shape) for each in states[0]] == [(2, 32), (1, 32)]
    return copies.count


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "qwen3",
        "qwen3_moe",
        "mistral",
        "phi3",
        "gemma2",
        "gemma3",
        "gpt_oss",
        "deepseek_v3",
        "cohere2",
    ],
)
def test_more_layers_do_not_wait_more_often(family: str) -> None:
    """Segments are longer than the windows of 8: their masks are made once, not in each layer."""
    assert family in FAMILIES
    num = num_copies(family, 1)
    assert num <= NUM_COPIES
    assert num_copies(family, 3) == num


def test_a_wait_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = kernels._flash

    def copying(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        torch.arange(3).to(query.device)
        return original(query, *args)

    monkeypatch.setitem(kernels._FUSED, kernels.FLASH, copying)
    assert num_copies("llama", 3) > num_copies("llama", 1)

    def waiting(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return original(query * query.amax().item(), *args)

    monkeypatch.setitem(kernels._FUSED, kernels.FLASH, waiting)
    with pytest.raises(RuntimeError, match="meta tensors"):
        num_copies("llama", 1)
