"""Checks of the GPU benchmark fail where a forward computes something else."""

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.gpu import correctness
from benchmarks.gpu.correctness import check_numbers
from benchmarks.gpu.models import FAMILIES
from benchmarks.gpu.results import Budget, Outcome, Results
from shopr1_service.engine.forward.base import Forward, IndependentForward, PromptGroup

CPU = torch.device("cpu")


class PromptLosing(IndependentForward):
    """Computes without the first tokens of a prompt."""

    def batch(self, groups: Sequence[PromptGroup]) -> list[list[torch.Tensor]]:
        return super().batch([PromptGroup(group.prompt_ids[4:], group.suffixes) for group in groups])


class WindowIgnoring(IndependentForward):
    """Computes with full attention in every layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        model.config.sliding_window = None
        super().__init__(model)


class Raising(IndependentForward):
    """Cannot compute at all."""

    def batch(self, groups: Sequence[PromptGroup]) -> list[list[torch.Tensor]]:
        raise ZeroDivisionError


def outcomes(
    monkeypatch: pytest.MonkeyPatch, family: str, make: Callable[[PreTrainedModel], Forward]
) -> list[Outcome]:
    """Outcomes of this forward as a strategy, in both dtypes."""
    monkeypatch.setattr(correctness, "FAMILIES", {family: FAMILIES[family]})
    monkeypatch.setattr(correctness, "STRATEGIES", {"broken": make})
    results = Results(CPU)
    check_numbers(CPU, Budget(60), results)
    return [row.outcome for row in results.rows if row.method == "broken"]


@pytest.mark.parametrize(
    ("family", "make"),
    [("llama", PromptLosing), ("qwen3_moe", PromptLosing), ("mistral", WindowIgnoring), ("llama", Raising)],
)
def test_wrong_numbers_fail(
    monkeypatch: pytest.MonkeyPatch, family: str, make: Callable[[PreTrainedModel], Forward]
) -> None:
    assert outcomes(monkeypatch, family, make) == [Outcome.FAIL, Outcome.FAIL]


def test_right_numbers_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcomes(monkeypatch, "mistral", IndependentForward) == [Outcome.PASS, Outcome.PASS]
