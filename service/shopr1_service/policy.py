"""A policy: what the service needs to know of a language model to measure its certainty."""

from collections.abc import Sequence
from typing import Protocol

from shopr1_client.wire import PolicyInfo
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.codec import Codec
from shopr1_service.engine import Certainty, TokenGroup, Unmeasurable
from shopr1_service.prefix import CacheStats


class Policy(Protocol):
    """The seam between the service and a model.

    `codec` may be used from several threads at once, `certainties` from one at a time.
    """

    @property
    def info(self) -> PolicyInfo:
        """As `GET /info` shows it."""
        ...

    @property
    def codec(self) -> Codec:
        """Its tokenizer."""
        ...

    @property
    def cache_stats(self) -> CacheStats:
        """What its prefix cache has done since it was loaded."""
        ...

    def certainties(
        self, group: TokenGroup, rules: SelfCertaintyRecipe
    ) -> Sequence[Certainty | Unmeasurable]:
        """Measure a group's completions, in order. Never raises on what a group holds."""
        ...
