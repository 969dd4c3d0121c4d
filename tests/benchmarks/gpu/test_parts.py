"""Variants and waits of the GPU benchmark."""

import warnings
from collections.abc import Callable

import pytest
import torch

from benchmarks.gpu import parts
from benchmarks.gpu.parts import num_waits
from benchmarks.gpu.results import Outcome, Row

ROW = Row("head", "5 tokens", "linear_fused", "float32", Outcome.MEASURED)
CPU = torch.device("cpu")


def measured(error: Callable[[], float], *, is_chosen: bool) -> Row:
    return parts._measured(ROW, error, lambda: None, 0.1, CPU, is_chosen=is_chosen)


def fail() -> float:
    raise RuntimeError("no kernel")


@pytest.mark.parametrize(
    ("error", "is_chosen", "outcome", "note"),
    [
        (lambda: 0.1, True, Outcome.PASS, "chosen"),
        (lambda: 0.1, False, Outcome.PASS, ""),
        (lambda: 0.2, True, Outcome.FAIL, "chosen not right"),
        (lambda: 0.2, False, Outcome.MEASURED, "not right"),
        (lambda: float("nan"), True, Outcome.FAIL, "chosen not right"),
        (fail, True, Outcome.FAIL, "chosen RuntimeError: no kernel"),
        (fail, False, Outcome.MEASURED, "RuntimeError: no kernel"),
    ],
)
def test_only_the_chosen_variant_can_fail(
    error: Callable[[], float], is_chosen: bool, outcome: Outcome, note: str
) -> None:
    row = measured(error, is_chosen=is_chosen)
    assert (row.outcome, row.note) == (outcome, note)


def test_waits_are_the_warnings_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str | int] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call() -> None:
        for _ in range(3):  # from one place: each counts
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert num_waits(call, torch.device("cuda")) == 3
    assert modes == ["warn", 0]
    assert num_waits(lambda: None, CPU) == 0
