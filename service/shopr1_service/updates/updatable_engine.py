"""The engine of this process with a policy whose weights and adapters change while it serves."""

from collections.abc import AsyncIterable

from shopr1_client.wire_policy import (
    AdapterRequest,
    AdapterUpdate,
    PolicyUpdate,
    TransferRequest,
    UpdateProgress,
    UpdateRequest,
)
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.scheduling.engine_client import OnFatal
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.settings import Settings
from shopr1_service.updates.adapter_updates import AdapterUpdates
from shopr1_service.updates.weight_updates import WeightUpdates


class UpdatableEngine(LocalEngine[LoadedPolicy]):
    """A local engine that takes weight and adapter updates."""

    def __init__(
        self,
        policy: LoadedPolicy,
        settings: Settings,
        metrics: Metrics,
        on_fatal: OnFatal = lambda error: None,
    ) -> None:
        super().__init__(policy, settings, metrics, on_fatal)
        shared = policy, self.scheduler, settings, metrics, self.new_versions
        self.weights, self.adapters = WeightUpdates(*shared), AdapterUpdates(*shared)

    @property
    def update_progress(self) -> UpdateProgress | None:
        return self.weights.progress

    async def load_checkpoint(self, request: UpdateRequest) -> PolicyUpdate:
        return await self.weights.from_checkpoint(request)

    async def load_upload(
        self, stream: AsyncIterable[bytes], version: str, *, is_partial: bool
    ) -> PolicyUpdate:
        return await self.weights.from_upload(stream, version, is_partial=is_partial)

    async def receive_broadcast(self, request: TransferRequest) -> PolicyUpdate:
        return await self.weights.from_trainer(request)

    async def load_adapter(self, request: AdapterRequest) -> AdapterUpdate:
        return await self.adapters.from_directory(request)

    async def load_uploaded_adapter(
        self, stream: AsyncIterable[bytes], request: AdapterRequest
    ) -> AdapterUpdate:
        return await self.adapters.from_upload(stream, request)

    async def unload_adapter(self, name: str, version: str | None = None) -> None:
        await self.adapters.unload(name, version)
