"""Tensors of a model, written to files and replaced."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shopr1_client.errors import InvalidWeightsError
from shopr1_service.weights import tensors as weights
from shopr1_service.weights.files import AnonymousTempFile
from shopr1_service.weights.tensors import Weights
from tests.support.models import one_thread, tiny_model
from tests.support.staging import loaded, staged
from tests.support.updating import NORM


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def flaws(model: PreTrainedModel, *tensors: tuple[str, Tensor]) -> dict[str, str]:
    with pytest.raises(InvalidWeightsError) as caught:
        staged(model, *tensors)
    return {each["location"]: each["message"] for each in caught.value.errors}


class Odd(nn.Module):
    """Tensors of unusual shapes and layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.arange(6.0).view(2, 3).T)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.other_empty = nn.Parameter(torch.zeros(3, 0))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("counts", torch.arange(3))
        self.device = torch.device("cpu")


def test_tensors_of_any_shape_and_layout() -> None:
    model: Any = Odd()
    kept = Weights(model)
    assert kept.tensors.keys() == {"transposed", "empty", "other_empty", "scalar"}
    assert kept.aliases == {}
    file = AnonymousTempFile()
    former = kept.store(kept.tensors, file)
    given_weights = [
        ("empty", torch.zeros(0, 4)),
        ("transposed", torch.arange(10.0, 16.0).view(3, 2)),
        ("other_empty", torch.zeros(3, 0)),
        ("scalar", torch.tensor(2.5)),
    ]
    loaded(model, *given_weights, is_partial=False)
    assert model.transposed.tolist() == [[10.0, 11.0], [12.0, 13.0], [14.0, 15.0]]
    assert model.transposed.stride() == (1, 3)
    assert model.scalar.item() == 2.5
    kept.load(former, lambda: None)
    assert (model.transposed.tolist(), model.scalar.item()) == ([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], 1.0)
    assert "differs from the policy's" in flaws(model, ("counts", model.counts + 1))["counts"]
    loaded(model, *given_weights, ("counts", model.counts.clone()), is_partial=False)


def test_each_piece_is_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PIECE_BYTES", 64)
    beats: list[int] = []
    model = tiny_model()
    Weights(model).load(staged(model, (NORM, torch.ones(32))), lambda: beats.append(1))
    assert len(beats) == 2  # 128 bytes
