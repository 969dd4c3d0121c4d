"""The fit of costs, and the measured costs as read from CSV."""

import numpy as np
import pytest

from benchmarks.capacity.costs import features, measured_cache_tokens, measured_costs, nonnegative_fit
from benchmarks.capacity.engine import Costs

SIZES = [(0, 100, 10), (0, 1000, 10), (500, 100, 10), (0, 100, 500), (2000, 10, 300)]


def fitted(costs: Costs) -> list[float]:
    times_s = np.array([costs.pass_s([size]) for size in SIZES])
    return list(nonnegative_fit(np.array([features(*size) for size in SIZES]) / times_s[:, None]))


def test_fit_recovers_the_costs() -> None:
    assert fitted(Costs(0.1, 2e-3, 1e-3, 1e-6)) == pytest.approx([0.1, 2e-3, 1e-3, 1e-6])
    assert fitted(Costs(0.0, 2e-3, 1e-3, 0.0)) == pytest.approx([0, 2e-3, 1e-3, 0], abs=1e-9)


def test_costs_are_not_negative() -> None:
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]) / np.array([[3.0], [2.0], [1.0]])  # 4 − x
    assert (nonnegative_fit(rows) >= 0).all()


def test_measured_costs_are_read() -> None:
    costs = measured_costs()
    assert 0 < costs.completion_token_s < 0.1
    assert 0 < costs.proxy_s < costs.ingress_s < 0.1
    assert costs.ingress_prompt_token_s > 0
    assert measured_cache_tokens() > 10_000
