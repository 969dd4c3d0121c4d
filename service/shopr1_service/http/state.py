"""The objects that an application holds while it runs."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Annotated, cast

from fastapi import Depends, Request
from prometheus_client import Metric

from shopr1_client.errors import NotReadyError
from shopr1_client.wire_policy import PolicyState
from shopr1_service.errors import RETRY_AFTER_S
from shopr1_service.http.middleware.availability import OpenRequests
from shopr1_service.monitoring.end_token_watch import EndTokenWatch
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.monitoring.rollout_log import open_rollout_log
from shopr1_service.policy.load_progress import LoadProgress
from shopr1_service.scheduling.engine_client import EngineClient, OnFatal, OpenEngine
from shopr1_service.scheduling.request_dedup import RequestDeduplicator
from shopr1_service.scoring.counted_requests import CountedRequests
from shopr1_service.scoring.label_store import LabelStore
from shopr1_service.scoring.recipe_book import RecipeBook
from shopr1_service.scoring.scorer import Scorer
from shopr1_service.settings import Settings

logger = logging.getLogger(__name__)

_CHECKS_PER_TIMEOUT = 10
_NUM_MISSED_CHECKS = 2
"""A process that was paused and resumes, as in a container, must not take the pause for a hang."""


class EngineHangsError(Exception):
    """The engine's heartbeat has stopped: the process must end."""


class State:
    """Settings, recipes, metrics and labels from the start; the scorer once the policy has been loaded."""

    def __init__(self, settings: Settings, startup: LoadProgress | None = None) -> None:
        self.settings = settings
        self.shutdown = asyncio.Event()
        self.open_requests = OpenRequests()
        self.recipes = RecipeBook(settings.recipe)
        self.metrics = Metrics(
            max_runs=settings.max_runs,
            max_queue_tokens=settings.max_queue_tokens,
            max_client_memory_bytes=settings.max_client_memory_bytes,
        )
        self.deduplicator = RequestDeduplicator(self.metrics)
        self.counted = CountedRequests()
        self.adapter_paths: dict[str, str] = {}  # of adapters loaded by SGLang's and vLLM's routes
        self.labels = LabelStore(settings.max_labels, self.metrics.memory)
        self._rollout_log = open_rollout_log(settings, self.metrics)
        self._scorer: Scorer | None = None
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
    def engine(self) -> EngineClient:
        """The scorer's engine. Raises as `scorer`."""
        return self.scorer.engine

    @property
    def policy_state(self) -> PolicyState:
        """The loaded versions, and the progress of the next one."""
        engine = self.engine
        versions = engine.versions
        return PolicyState(
            model=engine.info.model,
            current=versions.current.info,
            base=versions.base.info,
            adapters=[version.info for version in versions.loaded()],
            default_adapter=versions.default_adapter,
            update=engine.update_progress,
        )

    async def scrape_engines(self) -> Sequence[Metric] | None:
        """Metrics of engines in other processes, empty while the policy loads; None: there are none."""
        return () if self._scorer is None else await self._scorer.engine.scrape()

    @property
    def is_ready(self) -> bool:
        return self._scorer is not None and not self._is_closing

    @property
    def heartbeat_age_s(self) -> float:
        """Time since the engine's last heartbeat; 0 while the policy loads."""
        return 0.0 if self._scorer is None else self._scorer.engine.heartbeat_age_s

    def check_alive(self) -> None:
        """Raise `NotReadyError` if the engine hangs."""
        if self._hangs:
            raise NotReadyError(
                f"no heartbeat of the engine for {self.heartbeat_age_s:.0f} s", retry_after_s=RETRY_AFTER_S
            )

    async def load(self, open_engine: OpenEngine, on_fatal: OnFatal) -> None:
        """Load the policy.

        Args:
            on_fatal: called when the engine has failed; the service is not ready from then on.
        """

        def stop(error: BaseException) -> None:
            self.drain()
            on_fatal(error)

        engine = await open_engine(self.settings, self.metrics, stop)
        watch = EndTokenWatch(self.settings.max_runs)
        logs = [self._rollout_log.observe] if self._rollout_log else []
        observers = [self.metrics.observe, watch.observe, *logs]
        self._scorer = Scorer(engine, self.recipes, self.settings, self.metrics, observers)

    async def watch(self, on_fatal: OnFatal) -> None:
        """End all waiting and call `on_fatal` when there is no heartbeat for `engine_timeout_s`."""
        num_missed = 0
        while num_missed < _NUM_MISSED_CHECKS:
            await asyncio.sleep(self.settings.engine_timeout_s / _CHECKS_PER_TIMEOUT)
            num_missed = num_missed + 1 if self._hangs else 0
        stack = self._scorer.engine.stack() if self._scorer else ""
        logger.critical("no heartbeat of the engine for %.0f s; stack:\n%s", self.heartbeat_age_s, stack)
        self.drain()
        self.shutdown.set()
        on_fatal(EngineHangsError(f"no heartbeat for {self.settings.engine_timeout_s:g} s"))

    def drain(self) -> None:
        """Accept nothing more. Accepted work continues until `shutdown` is set."""
        self._is_closing = True

    def close(self) -> None:
        """End the threads; queued work is dropped."""
        self._is_closing = True
        if self._scorer is not None:
            self._scorer.close()
        if self._rollout_log is not None:
            self._rollout_log.close()

    @property
    def _hangs(self) -> bool:
        return self.heartbeat_age_s > self.settings.engine_timeout_s


def state_of(request: Request) -> State:
    """State of the application that serves a request."""
    return cast("State", request.app.state.shopr1)


async def _state_of(request: Request) -> State:
    # A coroutine: FastAPI calls other dependencies on a thread, which takes longer than some requests.
    return state_of(request)


AppState = Annotated[State, Depends(_state_of)]
