"""Whoever measures the groups of a request: the engine's scheduler in this process, or engines elsewhere."""

from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

from shopr1_service.core import Kind, Measurements, Progress, TokenGroup
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.base import Policy, PolicyView
from shopr1_service.scheduling.scheduler import Scheduler
from shopr1_service.settings import Settings


@runtime_checkable
class EngineClient(Protocol):
    """See the module. Used from the event loop only."""

    async def measure(
        self, groups: Sequence[TokenGroup], kind: Kind, progress: Progress | None = None
    ) -> list[Measurements]:
        """Measurements of each group's completions, in order. If cancelled, what still waits is dropped.

        Args:
            progress: kept up to date, for whoever may cancel.

        Raises:
            InvalidRequestError, PolicyVersionError: the target is not loaded, when its turn comes.
            OverloadedError: there is no room for these groups.
            NotReadyError: nothing can be measured any more.
        """
        ...

    def refuse_if_full(self) -> None:
        """Raise `OverloadedError` if there is no room for anything: before work is put into a request."""
        ...

    def stack(self) -> str:
        """Where the engine's thread is."""
        ...

    def close(self) -> None:
        """Begin nothing more; what waits is cancelled."""
        ...


def open_engine_client(
    policy: PolicyView, settings: Settings, metrics: Metrics, on_fatal: Callable[[BaseException], None]
) -> EngineClient:
    """The policy itself, if it measures elsewhere; else a scheduler of its own.

    Args:
        on_fatal: called when nothing can be measured any more.
    """
    if isinstance(policy, EngineClient):
        return policy
    return Scheduler(
        cast("Policy", policy),
        metrics,
        max_queue_tokens=settings.max_queue_tokens,
        is_deterministic=settings.deterministic,
        on_fatal=on_fatal,
    )
