"""Weights that are staged, without a service."""

import errno
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.weights.safetensors_header import TensorEntry
from shopr1_service.weights.staging import StagedWeights
from shopr1_service.weights.tensors import Weights, bytes_of


def entries_of(tensors: Sequence[tuple[str, Tensor]]) -> list[TensorEntry]:
    ends = list(itertools.accumulate((tensor.nbytes for _, tensor in tensors), initial=0))
    return [
        TensorEntry(name, tensor.dtype, tuple(tensor.shape), start, end)
        for (name, tensor), (start, end) in zip(tensors, itertools.pairwise(ends), strict=True)
    ]


def content_of(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    return b"".join(bytes(bytes_of(tensor.contiguous().view(-1))) for _, tensor in tensors if tensor.numel())


def stage_of(
    model: PreTrainedModel, directory: Path | None = None, *, is_partial: bool = True
) -> StagedWeights:
    return StagedWeights(Weights(model), directory, is_partial=is_partial)


def staged(model: PreTrainedModel, *tensors: tuple[str, Tensor], is_partial: bool = True) -> Any:
    """Locations of these tensors, after all checks."""
    stage = stage_of(model, is_partial=is_partial)
    stage.expect(entries_of(tensors))
    stage.append(memoryview(content_of(tensors)))
    stage.check()
    return stage.locations


def loaded(model: PreTrainedModel, *tensors: tuple[str, Tensor], **options: bool) -> None:
    """Put them into the model."""
    Weights(model).load(staged(model, *tensors, **options), lambda: None)


def check_equal(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing more be written than 1,000 bytes."""
    pwrite, num_left = os.pwrite, 1000

    def nearly_full(fd: int, block: memoryview, start: int) -> int:
        nonlocal num_left
        if not num_left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        num_written = pwrite(fd, block[:num_left], start)
        num_left -= num_written
        return num_written

    monkeypatch.setattr(os, "pwrite", nearly_full)
