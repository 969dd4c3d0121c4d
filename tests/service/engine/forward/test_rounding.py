"""Measured rounding against the difference of two exact arrangements, and errors by hand."""

import math

import pytest
import torch
from torch import Tensor

from shopr1_service.engine.forward.rounding import (
    Tolerance,
    describe,
    disturbed_rounding,
    relative_errors,
    tolerance_of,
)
from shopr1_service.engine.lm_head import trunk_of
from tests.support.models import random_ids, tiny_model

IDS = torch.tensor([random_ids(24, seed=1)])


def test_relative_errors() -> None:
    expected_T_H = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    actual_T_H = torch.tensor([[3.0, 5.0], [0.0, 2.0], [0.0, 0.0], [1.0, math.nan]])
    error_T = relative_errors(actual_T_H, expected_T_H)
    assert error_T[:3].tolist() == [0.2, 0.0, 0.0]
    assert error_T[3].isnan()


@pytest.mark.parametrize(
    ("errors", "is_allowed"),
    [
        ([0.1, 0.1, 0.1], True),
        ([0.1, 0.1, 0.9], True),  # a single position
        ([0.1, 0.1, 1.1], False),
        ([0.1, 0.3, 0.3], False),  # most positions
        ([0.1, 0.1, math.nan], False),
        ([math.nan] * 3, False),
    ],
)
def test_both_the_worst_and_the_typical_error_count(errors: list[float], is_allowed: bool) -> None:
    assert Tolerance(worst=1.0, typical=0.2).allows(torch.tensor(errors)) == is_allowed


@torch.no_grad()
def states(kind: str, dtype: torch.dtype, num_draws: int) -> tuple[Tolerance, Tensor, Tensor]:
    """The tolerance, and the states of eager and fused attention: two exact arrangements."""
    model = tiny_model(kind, dtype, num_hidden_layers=12)
    trunk = trunk_of(model)

    def run() -> Tensor:
        states_1_T_H: Tensor = trunk(input_ids=IDS, use_cache=False).last_hidden_state
        return states_1_T_H[0]

    fused_T_H = run()
    tolerance = tolerance_of(trunk, fused_T_H, run, num_draws=num_draws)
    assert torch.equal(run(), fused_T_H)  # nothing stays disturbed
    model.set_attn_implementation("eager")
    return tolerance, fused_T_H, run()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mixtral"])
def test_exact_arrangements_are_within_the_tolerance_and_not_far_below(kind: str, dtype: torch.dtype) -> None:
    tolerance, fused_T_H, eager_T_H = states(kind, dtype, 4)
    error_T = relative_errors(eager_T_H, fused_T_H)
    assert tolerance.allows(error_T)
    assert tolerance.typical < 10 * error_T.median()


def test_wider_types_have_a_fixed_tolerance() -> None:
    assert states("llama", torch.float32, 4)[0] == Tolerance(1e-4, 1e-4)
    assert states("llama", torch.float64, 4)[0] == Tolerance(1e-9, 1e-9)


def test_disturbances_are_reproducible_and_differ_by_seed() -> None:
    layer, input_1_H = torch.nn.Linear(64, 64).bfloat16(), torch.ones(1, 64).bfloat16()

    def disturbed(seed: int) -> Tensor:
        with disturbed_rounding(layer, seed):
            output: Tensor = layer(input_1_H)
            return output

    assert torch.equal(disturbed(1), disturbed(1))
    assert not torch.equal(disturbed(1), disturbed(2))
    ratio = disturbed(1).double() / layer(input_1_H).double()
    # Half a unit in the last place, and the rounding to 8 bits.
    assert (ratio - 1).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps


def test_describe() -> None:
    text = describe([torch.tensor([0.5, 0.25]), torch.tensor([0.125])], Tolerance(0.04, 0.01))
    assert text == "hidden states differ by 0.25 (at worst 0.5), rounding explains 0.01 (at worst 0.04)"
