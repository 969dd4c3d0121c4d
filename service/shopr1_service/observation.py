"""What metrics and logs get to see of a scored group.

The scoring core says what happened; who listens is put together in `state.py`. A listener that fails is
logged and costs nobody a reward.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shopr1_client.wire import Group, GroupScore
from shopr1_rewards import Recipe
from shopr1_service.preparation import PreparedGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Who asks.

    Attributes:
        request_id: as it stands in answer and logs.
        run: the training run that the request belongs to; empty if it named none.
    """

    request_id: str
    run: str = ""


@dataclass(frozen=True)
class ScoredGroup:
    """A group, as it was sent, as it was understood, and what it earned."""

    origin: Origin
    recipe: Recipe
    group: Group
    prepared: PreparedGroup
    score: GroupScore


Observer = Callable[[ScoredGroup], None]


def tell(observers: Iterable[Observer], scored: ScoredGroup) -> None:
    """Show a group to all who listen."""
    for observer in observers:
        try:
            observer(scored)
        except Exception:  # the reward is right, whatever a log does with it
            logger.exception("request %s: a listener failed", scored.origin.request_id)
