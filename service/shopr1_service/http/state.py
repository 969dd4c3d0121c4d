"""What the application holds while it runs."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, cast

from fastapi import Depends, Request
from prometheus_client import Metric

from shopr1_client.errors import (
    InvalidRequestError,
    NotReadyError,
)
from shopr1_client.wire_policy import PolicyState
from shopr1_service.concurrency import in_daemon_thread
from shopr1_service.errors import RETRY_AFTER_S
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.monitoring.rollout_log import open_rollout_log
from shopr1_service.policy.base import PolicyView, ScrapedPolicy
from shopr1_service.policy.load_progress import LoadProgress
from shopr1_service.scheduling.request_dedup import RequestDeduplicator
from shopr1_service.scoring.label_store import LabelStore
from shopr1_service.scoring.recipe_book import RecipeBook
from shopr1_service.scoring.scorer import Scorer
from shopr1_service.settings import Settings
from shopr1_service.updates.factory import AdapterChanges, Changes, WeightChanges, open_changes

logger = logging.getLogger(__name__)

_WATCHES_PER_TIMEOUT = 10
_NUM_SILENCES = 2
"""A process that was stopped and goes on, as a container that was paused, must not take that for a hang."""


class EngineHangsError(Exception):
    """The engine gives no sign of life: the process must end."""


class State:
    """Settings, recipes, metrics and labels from the start; the scorer once the policy has been loaded."""

    def __init__(self, settings: Settings, startup: LoadProgress | None = None) -> None:
        self.settings = settings
        self.cutoff = asyncio.Event()
        self.recipes = RecipeBook(settings.recipe)
        self.metrics = Metrics(max_runs=settings.max_runs, max_queue_tokens=settings.max_queue_tokens)
        self.repeats = RequestDeduplicator(self.metrics)
        self.labels = LabelStore(settings.max_labels)
        self._rollout_log = open_rollout_log(settings, self.metrics)
        self._scorer: Scorer | None = None
        self._changes: Changes | None = None
        self._startup = startup or LoadProgress()
        self._is_closing = False
        self.metrics.watch(lambda: self.is_ready, lambda: self.heartbeat_age_s)

    @property
    def scorer(self) -> Scorer:
        """The scorer.

        Raises:
            NotReadyError: the policy is loading, or the service is shutting down.
        """
        if self._is_closing:
            raise NotReadyError("the service is shutting down", retry_after_s=RETRY_AFTER_S)
        if self._scorer is None:
            raise NotReadyError(f"the policy is loading: {self._startup}", retry_after_s=RETRY_AFTER_S)
        return self._scorer

    @property
    def updates(self) -> WeightChanges:
        """Of the policy's weights.

        Raises:
            NotReadyError: as `scorer`.
            InvalidRequestError: this policy has no weights.
        """
        return self._open_changes[0]

    @property
    def adapters(self) -> AdapterChanges:
        """As `updates`, of adapters."""
        return self._open_changes[1]

    @property
    def policy_state(self) -> PolicyState:
        """What is loaded, and how far the next version is."""
        policy = self.scorer.policy
        versions = policy.versions
        return PolicyState(
            model=policy.info.model,
            current=versions.current.info,
            base=versions.base.info,
            adapters=[version.info for version in versions.loaded()],
            default_adapter=versions.default_adapter,
            update=self._changes[0].progress if self._changes else None,
        )

    @property
    def _open_changes(self) -> Changes:
        self.scorer  # noqa: B018  # raises when there is none
        if self._changes is None:
            raise InvalidRequestError("this policy does not change while it serves")
        return self._changes

    async def engine_metrics(self) -> Sequence[Metric] | None:
        """Of engines elsewhere; None: the engine is in this process. Nothing while there is none anywhere."""
        if self._scorer is None:
            return ()
        policy = self._scorer.policy
        return await policy.scrape() if isinstance(policy, ScrapedPolicy) else None

    @property
    def is_ready(self) -> bool:
        return self._scorer is not None and not self._is_closing

    @property
    def heartbeat_age_s(self) -> float:
        """Time since the engine's last sign of life; 0 as long as there is no engine."""
        return 0.0 if self._scorer is None else self._scorer.policy.heartbeat.age_s

    def check_alive(self) -> None:
        """Raise `NotReadyError` if the engine hangs."""
        if self.heartbeat_age_s > self.settings.engine_timeout_s:
            raise NotReadyError(
                f"the engine has given no sign for {self.heartbeat_age_s:.0f} s", retry_after_s=RETRY_AFTER_S
            )

    async def load(
        self, load_policy: Callable[[], PolicyView], on_fatal: Callable[[BaseException], None]
    ) -> None:
        """Load the policy beside the event loop, so that health checks are answered meanwhile.

        Args:
            on_fatal: called when the device is gone; nothing is ready from then on.
        """
        policy = await in_daemon_thread(load_policy, "load-policy")

        def give_up(error: BaseException) -> None:
            self.drain()
            on_fatal(error)

        observers = [self.metrics.observe, *([self._rollout_log.observe] if self._rollout_log else [])]
        scorer = Scorer(policy, self.recipes, self.settings, self.metrics, give_up, observers=observers)
        self._changes = open_changes(scorer, self.settings, self.metrics)
        self._scorer = scorer

    async def watch(self, on_fatal: Callable[[BaseException], None]) -> None:
        """Ends what waits, and calls `on_fatal`, when the engine gives no sign for `engine_timeout_s`."""
        num_silences = 0
        while num_silences < _NUM_SILENCES:
            await asyncio.sleep(self.settings.engine_timeout_s / _WATCHES_PER_TIMEOUT)
            is_silent = self.heartbeat_age_s > self.settings.engine_timeout_s
            num_silences = num_silences + 1 if is_silent else 0
        stack = self._scorer.stack() if self._scorer else ""
        logger.critical("no sign of the engine for %.0f s; it is here:\n%s", self.heartbeat_age_s, stack)
        self.drain()
        self.cutoff.set()
        on_fatal(EngineHangsError(f"no sign for {self.settings.engine_timeout_s:g} s"))

    def drain(self) -> None:
        """Begin nothing more. What has been begun goes on, until `cutoff`."""
        self._is_closing = True

    def close(self) -> None:
        self._is_closing = True
        if self._scorer is not None:
            self._scorer.close()
        if self._rollout_log is not None:
            self._rollout_log.close()


def state_of(request: Request) -> State:
    """The state of the application that serves a request (a FastAPI dependency)."""
    return cast("State", request.app.state.shopr1)


AppState = Annotated[State, Depends(state_of)]
