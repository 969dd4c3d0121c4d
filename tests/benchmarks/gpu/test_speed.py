"""Baselines and shares of the GPU benchmark."""

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.engine import baselines
from benchmarks.gpu import speed
from benchmarks.gpu.models import random_group, speed_model
from benchmarks.gpu.speed import Baseline
from benchmarks.meters import batch_flop, needed_flop
from benchmarks.workloads import Shape
from shopr1_service.core import TokenGroup

SHAPE = Shape(20, 5, 4)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return speed_model(torch.device("cpu"), torch.float32, is_tiny=True)


def test_out_of_memory_halves_a_batch(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    group = random_group(SHAPE, model.config.vocab_size, seed=1)
    whole = Baseline(model, keeps_all=False)(group)
    sizes: list[int] = []

    def limited(model: PreTrainedModel, part: TokenGroup, *, keeps_all: bool) -> list[torch.Tensor]:
        sizes.append(len(part.completions))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError
        return baselines.batch_certainties(model, part, keeps_all=keeps_all)

    monkeypatch.setattr(speed, "batch_certainties", limited)
    baseline = Baseline(model, keeps_all=False)
    for expected in ([5, 2, 2, 1], [2, 2, 1]):  # the second run does not try the whole batch again
        torch.testing.assert_close(baseline(group), whole)
        assert sizes == expected
        sizes.clear()


def test_out_of_memory_of_one_completion_is_raised(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed, "batch_certainties", fail)
    with pytest.raises(torch.OutOfMemoryError):
        Baseline(model, keeps_all=True)(random_group(SHAPE, model.config.vocab_size, seed=1))


def test_flop_of_the_methods(model: PreTrainedModel) -> None:
    """Hidden size 64, 4 heads of 16, 2 layers, 389 logits."""
    num_weights = sum(p.numel() for name, p in model.named_parameters() if "layers" in name)
    attention, head = 4 * 64 * 2, 2 * 64 * 389
    assert needed_flop(model, SHAPE) == pytest.approx(
        2 * num_weights * 40 + attention * (20 * 20 / 2 + 20 * 22) + head * 20
    )
    batch = 2 * num_weights * 120 + attention * 5 * 24 * 24 / 2
    assert batch_flop(model, SHAPE, keeps_all=False) == pytest.approx(batch + head * 20)
    assert batch_flop(model, SHAPE, keeps_all=True) == pytest.approx(batch + head * 120)
