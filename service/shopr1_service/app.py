"""The application: routes, errors, metrics and life cycle put together."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from shopr1_client.errors import UnauthenticatedError
from shopr1_service import __version__, health
from shopr1_service.api_keys import ApiKeys, KeyCheck
from shopr1_service.body_limit import BodyLimit
from shopr1_service.dialects import labels, llama_factory, nemo_gym, openrlhf, slime
from shopr1_service.openapi import build_document, problem_responses
from shopr1_service.policy import Policy
from shopr1_service.problems import install_handlers
from shopr1_service.request_id import RequestRecorder
from shopr1_service.routes import router
from shopr1_service.run_label import RunLabel
from shopr1_service.settings import Settings
from shopr1_service.state import State

logger = logging.getLogger(__name__)

_DIALECTS = (openrlhf, slime, llama_factory, nemo_gym, labels)

DESCRIPTION = """\
The reward of Shop-R1 (arXiv 2507.17842) for any RL trainer: format, the policy's exact self-certainty over
its rationale, and a hierarchical action reward (type → attribute → value) scaled by difficulty.
"""


def create_app(
    settings: Settings,
    load_policy: Callable[[], Policy],
    on_failure: Callable[[BaseException], None] = lambda error: None,
) -> FastAPI:
    """The ASGI application.

    Args:
        load_policy: called once at start, in a thread; until it returns, the service is live but not ready.
        on_failure: called when it raises, or when the device fails for good. The service cannot score then
            and should end.
    """
    state = State(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(state.load(load_policy, on_failure))
        loading.add_done_callback(_report_failure)
        yield
        loading.cancel()
        state.close()

    def _report_failure(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the policy cannot be loaded: %s", error)
            on_failure(error)

    app = FastAPI(
        title="Shop-R1 reward service",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
    )
    app.state.shopr1 = state
    # Counts what is streamed; the middleware refuses what is announced, and does so with a problem.
    for each in (router, *(module.router for module in _DIALECTS)):
        app.include_router(
            each, max_body_size=settings.max_body_bytes, responses=problem_responses(UnauthenticatedError)
        )
    app.include_router(health.router)
    install_handlers(app)
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(RunLabel)
    app.add_middleware(KeyCheck, keys=ApiKeys.of(settings))
    app.add_middleware(RequestRecorder, metrics=state.metrics)
    app.openapi = lambda: build_document(app)  # type: ignore[method-assign]  # FastAPI's documented way
    return app
