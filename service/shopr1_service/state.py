"""What the application holds while it runs."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, cast

from fastapi import Request

from shopr1_client.errors import NotReadyError
from shopr1_service.label_table import LabelTable
from shopr1_service.metrics import Metrics
from shopr1_service.policy import Policy
from shopr1_service.recipe_book import RecipeBook
from shopr1_service.repeats import Repeats
from shopr1_service.scorer import Scorer
from shopr1_service.settings import Settings

_RETRY_AFTER_S = 5.0


class State:
    """Settings, recipes, metrics and labels from the start; the scorer once the policy has been loaded."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.recipes = RecipeBook(settings.recipe)
        self.metrics = Metrics()
        self.repeats = Repeats(self.metrics)
        self.labels = LabelTable(settings.max_labels)
        self._scorer: Scorer | None = None
        self._is_closing = False

    @property
    def scorer(self) -> Scorer:
        """The scorer.

        Raises:
            NotReadyError: the policy is loading, or the service is shutting down.
        """
        if self._is_closing:
            raise NotReadyError("the service is shutting down", retry_after_s=_RETRY_AFTER_S)
        if self._scorer is None:
            raise NotReadyError("the policy is loading", retry_after_s=_RETRY_AFTER_S)
        return self._scorer

    async def load(
        self, load_policy: Callable[[], Policy], on_fatal: Callable[[BaseException], None]
    ) -> None:
        """Load the policy beside the event loop, so that health checks are answered meanwhile.

        Args:
            on_fatal: called when the device is gone; nothing is ready from then on.
        """
        policy = await _in_daemon_thread(load_policy)

        def give_up(error: BaseException) -> None:
            self._is_closing = True
            on_fatal(error)

        self._scorer = Scorer(
            policy, self.recipes, self.settings, self.metrics, give_up, observers=[self.metrics.observe]
        )

    def close(self) -> None:
        self._is_closing = True
        if self._scorer is not None:
            self._scorer.close()


async def _in_daemon_thread(load_policy: Callable[[], Policy]) -> Policy:
    """A daemon, because a load takes minutes and a service that is told to end should not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Policy] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: object) -> None:
        if not future.done():
            set_outcome(outcome)

    def report(set_outcome: Callable[[Any], None], outcome: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, set_outcome, outcome)

    def run() -> None:
        try:
            policy = load_policy()
        except BaseException as error:  # handed over, whatever it is
            report(future.set_exception, error)
        else:
            report(future.set_result, policy)

    threading.Thread(target=run, name="load-policy", daemon=True).start()
    return await future


def state_of(request: Request) -> State:
    """The state of the application that serves a request (a FastAPI dependency)."""
    return cast("State", request.app.state.shopr1)
