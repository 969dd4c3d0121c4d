"""The seam between the scheduler and a language model."""

from collections.abc import Sequence
from typing import Protocol

from shopr1_client.wire import PolicyInfo
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, EngineStats, TokenGroup, Unmeasurable, Version
from shopr1_service.engine.heartbeat import Heartbeat
from shopr1_service.policy.prompts.tokenizer import Codec
from shopr1_service.policy.versions import VersionTable


class Policy(Protocol):
    """A language model that computes self-certainties. `codec` may be used from several threads at once."""

    @property
    def info(self) -> PolicyInfo:
        """The policy, as `GET /info` shows it."""
        ...

    @property
    def versions(self) -> VersionTable:
        """The loaded versions. Any thread may read them; they change between calls of `certainties`."""
        ...

    @property
    def codec(self) -> Codec:
        """The policy's tokenizer."""
        ...

    @property
    def heartbeat(self) -> Heartbeat:
        """The heartbeat; beats at every pass, of which a call of `certainties` may take many."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Counters since the policy was loaded."""
        ...

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> Sequence[Sequence[Certainty | Unmeasurable]]:
        """Compute the self-certainties of several groups, in order. Called from one thread at a time.

        Args:
            version: one of those in `versions`; None is the current one.

        Raises:
            FatalEngineError: the device is unusable. The contents of a group never raise an error.
        """
        ...
