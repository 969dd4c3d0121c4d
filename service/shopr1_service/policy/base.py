"""A policy: what the service needs to know of a language model to measure its certainty."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from prometheus_client import Metric

from shopr1_client.wire import PolicyInfo
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, EngineStats, TokenGroup, Unmeasurable, Version
from shopr1_service.engine.heartbeat import Heartbeat
from shopr1_service.policy.tokenizer import Codec
from shopr1_service.policy.versions import VersionTable


class PolicyView(Protocol):
    """What routes and scorer look at. `codec` may be used from several threads at once."""

    @property
    def info(self) -> PolicyInfo:
        """As `GET /info` shows it."""
        ...

    @property
    def versions(self) -> VersionTable:
        """What is loaded. Changes between two calls of `certainties` only; may be read at any time."""
        ...

    @property
    def settled_number(self) -> int:
        """Of the last change that is made everywhere: no version from before it scores any more."""
        ...

    @property
    def codec(self) -> Codec:
        """Its tokenizer."""
        ...

    @property
    def heartbeat(self) -> Heartbeat:
        """Beats at every pass, however many `certainties` takes."""
        ...


@runtime_checkable
class ScrapedPolicy(PolicyView, Protocol):
    """A policy whose engines run elsewhere, and count for themselves."""

    async def scrape(self) -> Sequence[Metric]:
        """What they have counted, with the label `engine`. Those that do not answer are missing."""
        ...


class Policy(PolicyView, Protocol):
    """The seam between the service and a model. `certainties` is called from one thread at a time."""

    @property
    def stats(self) -> EngineStats:
        """What it has done since it was loaded."""
        ...

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> Sequence[Sequence[Certainty | Unmeasurable]]:
        """Measure the completions of several groups, in order. Never raises on what a group holds.

        Args:
            version: one of those in `versions`; None is the current one.

        Raises:
            FatalEngineError: the device is gone; nothing can be measured any more.
        """
        ...
