"""Whoever changes the policy for the routes: of the one in this process, or of engines elsewhere."""

from collections.abc import AsyncIterable
from typing import Protocol, cast, runtime_checkable

from shopr1_client.wire_policy import (
    AdapterRequest,
    AdapterUpdate,
    PolicyUpdate,
    TransferRequest,
    UpdateProgress,
    UpdateRequest,
)
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.base import PolicyView
from shopr1_service.policy.local import LoadedPolicy
from shopr1_service.scheduling.scheduler import Scheduler
from shopr1_service.scoring.scorer import Scorer
from shopr1_service.scoring.version_waiter import VersionWaiter
from shopr1_service.settings import Settings
from shopr1_service.updates.adapter_updates import AdapterUpdates
from shopr1_service.updates.weight_updates import Updates


class WeightChanges(Protocol):
    """Of the policy's own weights. `Updates` says what each does and raises."""

    @property
    def progress(self) -> UpdateProgress | None: ...

    async def from_checkpoint(self, request: UpdateRequest) -> PolicyUpdate: ...

    async def from_upload(
        self, stream: AsyncIterable[bytes], version: str, *, is_partial: bool
    ) -> PolicyUpdate: ...

    async def from_trainer(self, request: TransferRequest) -> PolicyUpdate: ...


class AdapterChanges(Protocol):
    """Of LoRA adapters. `AdapterUpdates` says what each does and raises."""

    async def from_directory(self, request: AdapterRequest) -> AdapterUpdate: ...

    async def from_upload(self, stream: AsyncIterable[bytes], request: AdapterRequest) -> AdapterUpdate: ...

    async def unload(self, name: str, version: str | None = None) -> None: ...


Changes = tuple[WeightChanges, AdapterChanges]


@runtime_checkable
class ChangingPolicy(PolicyView, Protocol):
    """A policy that changes elsewhere."""

    def open_changes(self, metrics: Metrics, new_versions: VersionWaiter) -> Changes:
        """Called once, on the event loop.

        Args:
            new_versions: to be told when it has changed.
        """
        ...


def open_changes(scorer: Scorer, settings: Settings, metrics: Metrics) -> Changes | None:
    """None: the scorer's policy has no weights."""
    policy = scorer.policy
    if isinstance(policy, ChangingPolicy):
        return policy.open_changes(metrics, scorer.new_versions)
    if not isinstance(policy, LoadedPolicy):
        return None
    how = policy, cast("Scheduler", scorer.measurer), settings, metrics, scorer.new_versions
    return Updates(*how), AdapterUpdates(*how)
