"""Errors in the configuration of the reward."""

import pickle

import pytest

from shopr1_rewards import (
    GroundTruthError,
    RewardsError,
    parse_recipe,
)


def test_ground_truth_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(GroundTruthError("no", "name")))
    assert isinstance(error, GroundTruthError)
    assert (str(error), error.field) == ("no", "name")


def test_recipe_errors_are_rewards_errors() -> None:
    with pytest.raises(RewardsError):
        parse_recipe("")
    assert issubclass(RewardsError, ValueError)
