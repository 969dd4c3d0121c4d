"""LoRA adapters with random weights, and the slow way to apply them."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.support.models import Reference, head_of

SCALE = 2.0
"""Scale of an adapter with `r` 3 and `lora_alpha` 6."""
PREFIX = "base_model.model."
# Their weight is multiplied with directly, not by the module.
BYPASSED = {
    "mamba": ["backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"],
    "jamba": ["model.layers.0.mamba.dt_proj"],
}


def linear_sizes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every linear module before the head."""
    sizes = {}
    for name, module in model.named_modules():
        if module is not head_of(model) and isinstance(module, nn.Linear | Conv1D):
            first, second = module.weight.shape
            sizes[name] = (second, first) if isinstance(module, Conv1D) else (first, second)
    return sizes


def random_tensors(
    model: PreTrainedModel, ranks: Mapping[str, int] | int = 3, seed: int = 0
) -> dict[str, Tensor]:
    """Adapter of every linear module, or of those named, as PEFT names and shapes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (num_outputs, num_inputs) in linear_sizes(model).items():
        r = ranks if isinstance(ranks, int) else ranks.get(name, 0)
        if r:
            a_R_I = 0.2 * torch.randn(r, num_inputs, generator=generator)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a_R_I
            tensors[f"{PREFIX}{name}.lora_B.weight"] = 0.3 * torch.randn(num_outputs, r, generator=generator)
    return tensors


@torch.no_grad()
def merged(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], scales: Mapping[str, float] | float = SCALE
) -> Reference:
    """The slow way: weights with the products added, all in fp64."""
    changed = copy.deepcopy(model).double()
    for name in linear_sizes(model):
        a_R_I = tensors.get(f"{PREFIX}{name}.lora_A.weight")
        if a_R_I is not None:
            b_O_R = tensors[f"{PREFIX}{name}.lora_B.weight"].double()
            scale = scales if isinstance(scales, float) else scales[name]
            product_O_I = scale * (b_O_R @ a_R_I.double())
            module = changed.get_submodule(name)
            assert isinstance(module, nn.Linear | Conv1D)
            module.weight += product_O_I.T if isinstance(module, Conv1D) else product_O_I
    return Reference(changed)
