"""The application: routes, middleware, problems and life cycle put together."""

import asyncio
import functools
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI

from shopr1_client.errors import ForbiddenError, InvalidRequestError, UnauthenticatedError
from shopr1_service import __version__
from shopr1_service.dialects import engine_api, labels, llama_factory, nemo_gym, openrlhf, slime
from shopr1_service.dialects import examples as trainer_examples
from shopr1_service.errors import SettingsError
from shopr1_service.http import examples
from shopr1_service.http.api_keys import ApiKeys
from shopr1_service.http.middleware.auth import Authentication
from shopr1_service.http.middleware.availability import Availability
from shopr1_service.http.middleware.body_limits import BodyLimits
from shopr1_service.http.middleware.request_recorder import RequestRecorder
from shopr1_service.http.middleware.run_id import RunId
from shopr1_service.http.openapi import build_document
from shopr1_service.http.problem_responses import problem_responses
from shopr1_service.http.problems import REQUEST_ID_HEADER, install_handlers
from shopr1_service.http.routes import policy, score, service
from shopr1_service.http.state import State
from shopr1_service.policy.load_progress import LoadProgress
from shopr1_service.scheduling.engine_client import OnFatal, OpenEngine
from shopr1_service.settings import Settings

if TYPE_CHECKING:
    from shopr1_service.monitoring.tracing import Tracer  # needs the extra `otel`

logger = logging.getLogger(__name__)

_LIMITED = (score, service, policy, openrlhf, slime, llama_factory, nemo_gym, labels, engine_api)
"""Modules with routes whose bodies are bounded by `max_body_bytes`."""
# The id is written into logs: it must not be able to forge a line.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

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
        on_failure: called when it raises, or when the engine fails or hangs for good. The service cannot
            score then and should end.
        startup: progress of loading, which `open_engine` updates; shown while the service is not ready.
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
        # Its spans hold URLs, and with them keys, and its logs the texts of exceptions.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.shopr1 = state
    for dialect in (openrlhf.DIALECT, slime.DIALECT, llama_factory.DIALECT, nemo_gym.DIALECT):
        state.metrics.expect_fallbacks(dialect.name)
    _add_routes(app, settings)
    _add_middleware(app, settings, state, tracer)
    install_handlers(app)
    document = functools.cache(lambda: build_document(app, examples.ANSWERS | trainer_examples.ANSWERS))
    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def _add_routes(app: FastAPI, settings: Settings) -> None:
    refusals = problem_responses(UnauthenticatedError, ForbiddenError, InvalidRequestError)
    # This limit counts streamed bodies. The middleware refuses announced ones, and does so with a problem.
    for module in _LIMITED:
        app.include_router(module.router, max_body_size=settings.max_body_bytes, responses=refusals)
    app.include_router(policy.stream_router, responses=refusals)
    app.include_router(service.health_router)


def _add_middleware(app: FastAPI, settings: Settings, state: State, tracer: "Tracer | None") -> None:
    """Add middleware from the inside out: a request passes the last one first."""
    app.add_middleware(
        BodyLimits,
        max_body_bytes=settings.max_body_bytes,
        timeout_s=settings.receive_timeout_s,
        memory=state.metrics.memory,
    )
    app.add_middleware(RunId)
    app.add_middleware(Authentication, keys=ApiKeys.of(settings))
    app.add_middleware(Availability, open_requests=state.open_requests)
    app.add_middleware(
        RequestRecorder, metrics=state.metrics, has_access_log=settings.access_log, tracer=tracer
    )
    app.add_middleware(
        CorrelationIdMiddleware,
        header_name=REQUEST_ID_HEADER,
        validator=lambda given: _REQUEST_ID.fullmatch(given) is not None,
    )


def open_tracer() -> "Tracer":
    """Set up tracing.

    Raises:
        SettingsError: OpenTelemetry is not installed, or refuses its variables.
    """
    try:
        from shopr1_service.monitoring.tracing import Tracer
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"tracing = true needs OpenTelemetry ({error.name} is missing): pip install 'shopr1[otel]'"
        ) from error
    return Tracer()
