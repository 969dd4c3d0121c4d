"""The application: routes, errors, metrics and life cycle put together."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from shopr1_client.errors import ForbiddenError, InvalidRequestError, UnauthenticatedError
from shopr1_service import __version__
from shopr1_service.dialects import engine_api as engines
from shopr1_service.dialects import examples as trainer_answers
from shopr1_service.dialects import labels, llama_factory, nemo_gym, openrlhf, slime
from shopr1_service.errors import SettingsError
from shopr1_service.http import examples as answers
from shopr1_service.http.api_keys import ApiKeys
from shopr1_service.http.middleware.auth import Authentication
from shopr1_service.http.middleware.body_limits import BodyLimits
from shopr1_service.http.middleware.request_id import RequestRecorder
from shopr1_service.http.middleware.run_id import RunId
from shopr1_service.http.openapi import build_document
from shopr1_service.http.problem_responses import problem_responses
from shopr1_service.http.problems import install_handlers
from shopr1_service.http.routes import health
from shopr1_service.http.routes import policy as policy_routes
from shopr1_service.http.routes.score import router
from shopr1_service.http.state import State
from shopr1_service.policy.load_progress import LoadProgress
from shopr1_service.scheduling.engine_client import OnFatal, OpenEngine
from shopr1_service.settings import Settings

if TYPE_CHECKING:
    from shopr1_service.http.middleware.tracing import Tracer  # needs the extra `otel`

logger = logging.getLogger(__name__)

_DIALECTS = (openrlhf, slime, llama_factory, nemo_gym, labels, engines)

DESCRIPTION = """\
The reward of Shop-R1 (arXiv 2507.17842) for any RL trainer: format, the policy's exact self-certainty over
its rationale, and a hierarchical action reward (type → attribute → value) scaled by difficulty.
"""


def create_app(
    settings: Settings,
    open_engine: OpenEngine,
    on_failure: OnFatal = lambda error: None,
    startup: LoadProgress | None = None,
) -> FastAPI:
    """The ASGI application.

    Args:
        open_engine: called once at start; until it returns, the service is live but not ready.
        on_failure: called when `open_engine` raises, or when the engine fails or hangs for good. The service
            cannot score then and should end.
        startup: progress of loading, shown until the service is ready.
    """
    state = State(settings, startup)
    tracer = open_tracer() if settings.tracing else None

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(state.load(open_engine, on_failure))
        loading.add_done_callback(_report_failure)
        watching = asyncio.create_task(state.watch(on_failure))
        yield
        watching.cancel()
        loading.cancel()
        state.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    def _report_failure(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the policy cannot be loaded: %s", error)
            on_failure(error)

    app = FastAPI(
        title="Shop-R1 reward service",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would go to whatever host the client named
        # Its spans hold URLs, and with them keys, and its logs what exceptions say.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.shopr1 = state
    _add_routes(app, settings)
    _add_middleware(app, settings, state, tracer)
    install_handlers(app)
    app.openapi = lambda: build_document(app, {**answers.ANSWERS, **trainer_answers.ANSWERS})  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def _add_routes(app: FastAPI, settings: Settings) -> None:
    refusals = problem_responses(UnauthenticatedError, ForbiddenError, InvalidRequestError)
    # Counts what is streamed; the middleware refuses what is announced, and does so with a problem.
    for each in (router, policy_routes.router, *(module.router for module in _DIALECTS)):
        app.include_router(each, max_body_size=settings.max_body_bytes, responses=refusals)
    app.include_router(policy_routes.stream_router, responses=refusals)
    app.include_router(health.router)


def _add_middleware(app: FastAPI, settings: Settings, state: State, tracer: "Tracer | None") -> None:
    """From the inside out: a request passes the last one first."""
    app.add_middleware(
        BodyLimits, max_body_bytes=settings.max_body_bytes, timeout_s=settings.receive_timeout_s
    )
    app.add_middleware(RunId)
    app.add_middleware(Authentication, keys=ApiKeys.of(settings))
    app.add_middleware(RequestRecorder, metrics=state.metrics, has_access_log=settings.access_log)
    if tracer is not None:
        app.add_middleware(tracer.middleware)


def open_tracer() -> "Tracer":
    """Begin to trace.

    Raises:
        SettingsError: OpenTelemetry is not installed, or makes no sense of its variables.
    """
    try:
        from shopr1_service.http.middleware.tracing import Tracer
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"tracing = true needs OpenTelemetry ({error.name} is missing): pip install 'shopr1[otel]'"
        ) from error
    return Tracer()
