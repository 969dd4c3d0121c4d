"""Passes that the check compares: short prompts in all arrangements, independent states, their errors."""

import pytest
import torch
from torch.testing import assert_close

from shopr1_service.engine.forward.base import IndependentForward
from shopr1_service.engine.forward.comparison import (
    batch_errors,
    independent_states,
    pass_tolerance,
    short_groups,
)
from shopr1_service.engine.lm_head import trunk_of
from tests.support.models import random_ids, tiny_model

IDS = random_ids(24, seed=9)


def test_states_are_those_of_one_pass_of_the_trunk() -> None:
    model = tiny_model()
    expected_T_H = trunk_of(model)(input_ids=torch.tensor([IDS]), use_cache=False).last_hidden_state[0]
    assert_close(independent_states(model, IDS), expected_T_H, rtol=0, atol=0)


def test_prompts_have_all_arrangements() -> None:
    first, second, third = short_groups(IDS)
    assert first.prompt_ids == second.prompt_ids  # it may be cached
    assert third.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids  # it extends a cached one
    assert {len(suffix.ids) for suffix in first.suffixes} == {0, 1, 2, 6}
    for group in (second, third):
        rows = [list(suffix.ids) for suffix in group.suffixes]
        assert len({tuple(row) for row in rows}) > 1
        assert len({tuple(row[:-1]) for row in rows}) == 1  # a common beginning, and rows of equal length


def test_each_completion_has_its_error() -> None:
    groups = short_groups(IDS)
    expected = IndependentForward(tiny_model()).batch(groups)
    actual = [[states_S_H * 1.0 for states_S_H in states] for states in expected]
    actual[1][2] *= 1.5
    errors = [float(error_S.max()) for error_S in batch_errors(actual, expected)]
    changed = len(groups[0].suffixes) + 2
    assert errors == pytest.approx([0.5 if i == changed else 0.0 for i in range(len(errors))])
    assert len(errors) == sum(len(group.suffixes) for group in groups)


def test_only_16_bits_are_measured() -> None:
    for dtype, is_measured in ((torch.float32, False), (torch.bfloat16, True)):
        model = tiny_model(dtype=dtype)
        tolerance = pass_tolerance(model, IDS, independent_states(model, IDS), 2)
        assert (tolerance.worst > 1e-4) == is_measured
