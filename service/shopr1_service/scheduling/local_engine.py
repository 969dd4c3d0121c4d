"""The engine of this process: a policy and its scheduler."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from shopr1_client.wire import PolicyInfo
from shopr1_service.concurrency import in_daemon_thread
from shopr1_service.core import BatchKey, GroupCertainties, Progress, TokenGroup
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.base import Policy
from shopr1_service.policy.prompts.tokenizer import Codec
from shopr1_service.policy.versions import VersionTable
from shopr1_service.scheduling.engine_client import EngineClient, OnFatal, OpenEngine
from shopr1_service.scheduling.scheduler import Scheduler
from shopr1_service.scheduling.version_waiter import VersionWaiter
from shopr1_service.settings import Settings

AnyPolicy = TypeVar("AnyPolicy", bound=Policy)


class LocalEngine(EngineClient, Generic[AnyPolicy]):
    """A policy that does not change, and its scheduler."""

    def __init__(
        self,
        policy: AnyPolicy,
        settings: Settings,
        metrics: Metrics,
        on_fatal: OnFatal = lambda error: None,
    ) -> None:
        self.policy = policy
        self.new_versions = VersionWaiter(lambda: policy.versions)
        self.scheduler = Scheduler(
            policy,
            metrics,
            max_queue_tokens=settings.max_queue_tokens,
            is_deterministic=settings.deterministic,
            on_fatal=on_fatal,
        )
        metrics.policy.record_loaded(policy.info)

    @classmethod
    def opener(cls, load_policy: Callable[[], AnyPolicy]) -> OpenEngine:
        """A function that opens this engine; it calls `load_policy` on a thread of its own."""

        async def open_engine(settings: Settings, metrics: Metrics, on_fatal: OnFatal) -> EngineClient:
            policy = await in_daemon_thread(load_policy, "load-policy")
            return cls(policy, settings, metrics, on_fatal)

        return open_engine

    @property
    def info(self) -> PolicyInfo:
        return self.policy.info

    @property
    def versions(self) -> VersionTable:
        return self.policy.versions

    @property
    def codec(self) -> Codec:
        return self.policy.codec

    @property
    def heartbeat_age_s(self) -> float:
        return self.policy.heartbeat.age_s

    async def compute_certainties(
        self, groups: Sequence[TokenGroup], key: BatchKey, progress: Progress | None = None
    ) -> list[GroupCertainties]:
        return await self.scheduler.compute_certainties(groups, key, progress)

    def refuse_if_full(self) -> None:
        self.scheduler.refuse_if_full()

    def stack(self) -> str:
        return self.scheduler.stack()

    def close(self) -> None:
        self.scheduler.close()
