"""The choice of a reduction, with reductions that are right, wrong, broken, fast and slow."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shopr1_rewards.recipe import Divergence
from shopr1_rewards.self_certainty import LogitSums, divergences
from shopr1_service.engine.fused_head.choice import (
    Reduction,
    fastest_head,
    reductions,
    with_fastest_reduction,
)
from shopr1_service.engine.lm_head import LinearHead
from tests.support.models import head_of, random_ids, tiny_model

HIDDEN_T_H = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def right(
    head: LinearHead, hidden_T_H: Tensor, num_rows: int, temperature: float, weighs: bool, sums: bool
) -> LogitSums:
    """All logits at once."""
    logits_T_V = torch.cat(list(head.logit_chunks(hidden_T_H, num_rows)), dim=1)
    return LogitSums.of(logits_T_V, temperature, weighs=weighs, sums=sums)


def with_change(change: Callable[[LogitSums], LogitSums]) -> Reduction:
    return lambda *args: change(right(*args))


def fail(*_args: object) -> LogitSums:
    raise RuntimeError("out of shared memory")


def ignoring_rows(
    head: LinearHead, hidden_T_H: Tensor, num_rows: int, temperature: float, weighs: bool, sums: bool
) -> LogitSums:
    """Counts the head's padding, whatever is asked for."""
    found = right(head, hidden_T_H, head.num_rows, temperature, weighs, sums)
    return replace(found, num_logits=num_rows)


WRONG: Mapping[str, Reduction] = {
    "a phantom logit": with_change(lambda s: replace(s, exp_sum_T=s.exp_sum_T + 1e-2)),
    "sums that vanish": with_change(lambda s: replace(s, exp_sum_T=s.exp_sum_T * 0)),
    "no temperature": lambda head, hidden_T_H, num_rows, _temperature, *flags: right(
        head, hidden_T_H, num_rows, 1.0, *flags
    ),
    "padding": ignoring_rows,
    "NaN": with_change(lambda s: replace(s, exp_sum_T=s.exp_sum_T * torch.nan)),
    "NaN is lost": with_change(
        lambda s: (
            replace(
                s, max_T=s.max_T.nan_to_num(), exp_sum_T=s.exp_sum_T.nan_to_num(1.0), exp_weighted_sum_T=None
            )
            if s.exp_weighted_sum_T is None
            else replace(
                s,
                exp_sum_T=s.exp_sum_T.nan_to_num(1.0),
                exp_weighted_sum_T=s.exp_weighted_sum_T.nan_to_num(0),
            )
        )
    ),
    "fails": fail,
}


def head_with(*, softcap: float | None = 5.0) -> LinearHead:
    weight_V_H = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    return LinearHead(weight_V_H, torch.full((50,), -3.0), softcap=softcap)


def times(**of: float) -> Callable[[LinearHead], float]:
    return lambda head: of[head.name]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_reductions_are_not_used(
    kind: str, softcap: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    head = head_with(softcap=softcap)
    chosen = fastest_head(head, {"wrong": WRONG[kind]}, HIDDEN_T_H, times(linear=1.0, linear_wrong=0.1))
    assert chosen is head
    assert "linear_wrong is not used" in caplog.text


def test_the_faster_of_the_right_ones_is_used() -> None:
    head, candidates = head_with(), {"wrong": WRONG["padding"], "one": right, "two": right}
    chosen = fastest_head(
        head, candidates, HIDDEN_T_H, times(linear=3.0, linear_one=2.0, linear_two=1.0, linear_wrong=0.1)
    )
    assert chosen.name == "linear_two"
    values = [divergences(HIDDEN_T_H, each, Divergence.KL_U_P) for each in (chosen, head)]
    torch.testing.assert_close(*values, rtol=0, atol=1e-5)
    slower = fastest_head(head, {"one": right}, HIDDEN_T_H, times(linear=1.0, linear_one=2.0))
    assert slower is head


def test_a_reduced_head_sees_new_weights() -> None:
    """The mean row is dropped with the old weights."""
    head = fastest_head(
        head_with(softcap=None), {"one": right}, HIDDEN_T_H, times(linear=2.0, linear_one=1.0)
    )
    divergences(HIDDEN_T_H, head, Divergence.KL_U_P)
    head.weight_V_H.add_(torch.randn(50, 16, generator=torch.Generator().manual_seed(5)))
    head.renew()
    fresh = LinearHead(head.weight_V_H, head.bias_V)
    values = [divergences(HIDDEN_T_H, each, Divergence.KL_U_P) for each in (head, fresh)]
    torch.testing.assert_close(*values, rtol=0, atol=1e-5)


def test_on_a_cpu_nothing_is_tried() -> None:
    model = tiny_model()
    head = LinearHead(head_of(model).weight)
    assert with_fastest_reduction(head, model, torch.tensor([random_ids(10)])) is head


def test_without_triton_there_is_no_reduction(caplog: pytest.LogCaptureFixture) -> None:
    if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1":
        assert list(reductions()) == ["written", "fused"]
    elif importlib.util.find_spec("triton") is None:
        assert reductions() == {}
        assert "No module named 'triton'" in caplog.text
