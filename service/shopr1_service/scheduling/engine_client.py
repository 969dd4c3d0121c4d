"""The engine as the HTTP side sees it: the one of this process, or several behind Ray."""

from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from typing import Protocol

from prometheus_client import Metric

from shopr1_client.errors import InvalidRequestError
from shopr1_client.wire import PolicyInfo
from shopr1_client.wire_policy import (
    AdapterRequest,
    AdapterUpdate,
    PolicyUpdate,
    TransferRequest,
    UpdateProgress,
    UpdateRequest,
)
from shopr1_service.core import BatchKey, GroupCertainties, Progress, TokenGroup
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.prompts.tokenizer import Codec
from shopr1_service.policy.versions import VersionTable
from shopr1_service.scheduling.version_waiter import VersionWaiter
from shopr1_service.settings import Settings


class EngineClient(Protocol):
    """Computes self-certainties with a policy whose weights and adapters may change.

    An implementation inherits from this class. Inherited as they are, its methods describe an engine that
    never refuses work early, never hangs, and whose policy does not change. Used from the event loop only;
    `codec` may be used from several threads at once.
    """

    new_versions: VersionWaiter
    """Notified when the loaded versions change."""

    @property
    def info(self) -> PolicyInfo:
        """The policy, as `GET /info` shows it."""
        ...

    @property
    def versions(self) -> VersionTable:
        """The loaded versions."""
        ...

    @property
    def codec(self) -> Codec:
        """The policy's tokenizer."""
        ...

    async def compute_certainties(
        self, groups: Sequence[TokenGroup], key: BatchKey, progress: Progress | None = None
    ) -> list[GroupCertainties]:
        """Compute the self-certainties of all groups, in order. If cancelled, queued groups are dropped.

        Args:
            progress: is kept up to date.

        Raises:
            InvalidRequestError, PolicyVersionError: the target is not loaded when a group's turn comes.
            OverloadedError: the queue has no room for these groups.
            NotReadyError: the engine has failed, or the service is shutting down.
        """
        ...

    @property
    def settled_number(self) -> int:
        """Number of the last change that every engine has made: no older version scores any more."""
        return self.versions.num_changes

    def refuse_if_full(self) -> None:
        """Raise `OverloadedError` if the queue is full, before a request is prepared."""
        return

    @property
    def heartbeat_age_s(self) -> float:
        """Time since the engine's last heartbeat."""
        return 0.0

    def stack(self) -> str:
        """Stack of the engine's thread."""
        return "the engines run in other processes"

    async def scrape(self) -> Sequence[Metric] | None:
        """Metrics of engines in other processes; None if this process counts them itself."""
        return None

    @property
    def update_progress(self) -> UpdateProgress | None:
        """Progress of a weight update that is under way."""
        return None

    async def load_checkpoint(self, request: UpdateRequest) -> PolicyUpdate:
        """Replace the policy's weights by those of a checkpoint.

        Raises (as every method that changes the policy):
            InvalidRequestError: this policy does not change.
            InvalidWeightsError: the weights do not fit this policy.
            UpdateConflictError: another update is under way.
            StorageError: the weights cannot be read or stored.
            NotReadyError: the service is shutting down.
        """
        raise _does_not_change()

    async def load_upload(
        self, stream: AsyncIterable[bytes], version: str, *, is_partial: bool
    ) -> PolicyUpdate:
        """Replace the policy's weights by those of an uploaded safetensors file."""
        raise _does_not_change()

    async def receive_broadcast(self, request: TransferRequest) -> PolicyUpdate:
        """Replace the policy's weights by those that a trainer broadcasts."""
        raise _does_not_change()

    async def load_adapter(self, request: AdapterRequest) -> AdapterUpdate:
        """Load an adapter from a directory.

        Raises:
            TooLargeError: the adapter is too large, or too many are loaded.
        """
        raise _does_not_change()

    async def load_uploaded_adapter(
        self, stream: AsyncIterable[bytes], request: AdapterRequest
    ) -> AdapterUpdate:
        """Load an adapter from an uploaded safetensors file."""
        raise _does_not_change()

    async def unload_adapter(self, name: str, version: str | None = None) -> None:
        """Unload an adapter, or one version of it.

        Raises:
            NotFoundError: the adapter is not loaded.
        """
        raise _does_not_change()

    def close(self) -> None:
        """Start nothing more; queued groups are cancelled."""
        ...


OnFatal = Callable[[BaseException], None]
"""Called when the engine cannot compute anything any more."""
OpenEngine = Callable[[Settings, Metrics, OnFatal], Awaitable[EngineClient]]
"""Loads the policy; awaited on the event loop, which must stay responsive meanwhile."""


def _does_not_change() -> InvalidRequestError:
    return InvalidRequestError("this policy does not change while it serves")
