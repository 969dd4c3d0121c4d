"""Copies of a model that stay as loaded when it computes: some models change with what they are fed."""

import copy
from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel


def unused_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that has not computed anything yet: the weights are shared, and nothing else."""
    shared = [*model.parameters(), *_saved_buffers(model)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _saved_buffers(model: nn.Module) -> Iterator[Tensor]:
    """Buffers that checkpoints have: the weights of quantised layers are such."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer
