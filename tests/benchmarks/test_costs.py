"""What is fitted, and that what has been measured can be read."""

import numpy as np
import pytest

from costs import features, nonnegative_fit
from simulated_costs import measured_costs, measured_kept_tokens
from simulated_engine import Costs

SIZES = [(0, 100, 10), (0, 1000, 10), (500, 100, 10), (0, 100, 500), (2000, 10, 300)]


def fitted(costs: Costs) -> list[float]:
    times_s = np.array([costs.pass_s([size]) for size in SIZES])
    return list(nonnegative_fit(np.array([features(*size) for size in SIZES]) / times_s[:, None]))


def test_a_fit_finds_what_times_were_made_of() -> None:
    assert fitted(Costs(0.1, 2e-3, 1e-3, 1e-6)) == pytest.approx([0.1, 2e-3, 1e-3, 1e-6])
    assert fitted(Costs(0.0, 2e-3, 1e-3, 0.0)) == pytest.approx([0, 2e-3, 1e-3, 0], abs=1e-9)


def test_nothing_costs_less_than_nothing() -> None:
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]) / np.array([[3.0], [2.0], [1.0]])  # 4 − x
    assert (nonnegative_fit(rows) >= 0).all()


def test_what_was_measured_is_read() -> None:
    costs = measured_costs()
    assert 0 < costs.own_token_s < 0.1
    assert 0 < costs.proxy_s < costs.ingress_s < 0.1
    assert costs.ingress_prompt_token_s > 0
    assert measured_kept_tokens() > 10_000
