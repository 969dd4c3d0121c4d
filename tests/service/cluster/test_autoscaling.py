"""How many engines there should be."""

from dataclasses import dataclass, field

import pytest

from shopr1_service.cluster.autoscaling import QUEUED_TOKENS, QueuedTokens


@dataclass
class Context:
    """As Ray gives it."""

    current_num_replicas: int
    total_num_requests: float
    aggregated_metrics: dict[str, dict[str, float]] | None = field(default_factory=dict)


@pytest.mark.parametrize(
    ("waiting", "num_requests", "current", "wanted"),
    [
        ({"a": 0.0, "b": 0.0}, 0.0, 2, 0),  # nothing to do: Ray keeps the fewest that may be
        ({"a": 0.0, "b": 0.0}, 1.0, 2, 1),
        ({"a": 0.0, "b": 0.0}, 9.0, 2, 2),  # all are busy, and nothing waits
        ({"a": 100.0, "b": 0.0}, 9.0, 2, 2),
        ({"a": 100.0, "b": 101.0}, 9.0, 2, 3),
        ({"a": 950.0}, 9.0, 1, 10),
        (None, 0.5, 1, 1),
    ],
)
def test_as_many_as_what_waits_needs(
    waiting: dict[str, float] | None, num_requests: float, current: int, wanted: int
) -> None:
    metrics = None if waiting is None else {QUEUED_TOKENS: waiting}
    number, state = QueuedTokens(target_tokens=100)(Context(current, num_requests, metrics))
    assert (number, state) == (wanted, {})
