"""How many engines there should be: from the tokens that wait for them."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

QUEUED_TOKENS = "queued_tokens"
"""What engines tell Ray (`EngineReplica.record_autoscaling_stats`)."""


class Context(Protocol):
    """What of Ray's `AutoscalingContext` is looked at."""

    current_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...

    @property
    def total_num_requests(self) -> float: ...


class QueuedTokens:
    """Ray's policy of a deployment: as many engines as keep what waits at each below a target.

    Engines that have something to do are not taken away: nothing waits where one is just fast enough. Bounds
    and delays are Ray's.

    Args:
        target_tokens: that may wait for each engine.
    """

    def __init__(self, target_tokens: int) -> None:
        self._target_tokens = target_tokens

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """Number of engines, and what is to be remembered: nothing."""
        waiting = (context.aggregated_metrics or {}).get(QUEUED_TOKENS, {})
        num_wanted = math.ceil(sum(waiting.values()) / self._target_tokens)
        num_busy = min(context.current_num_replicas, math.ceil(context.total_num_requests))
        return max(num_wanted, num_busy), {}
