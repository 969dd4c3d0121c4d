"""Counts, logs and traces every request."""

import logging
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shopr1_service.http.middleware.auth import METRICS_PATH, OPEN_PATHS
from shopr1_service.monitoring.logs import current_run
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.monitoring.spans import current_trace

if TYPE_CHECKING:
    from shopr1_service.monitoring.tracing import Tracer  # needs the extra `otel`

SIZES = "shopr1.sizes"
"""In a request's scope: how many groups and rollouts it wants scored, for its log line and its span."""

_access_log = logging.getLogger("shopr1_service.access")
_POLLED = (OPEN_PATHS, METRICS_PATH)
"""Requested every few seconds by machines: logged at debug only, and never traced."""
_KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_UNKNOWN = "unknown"


class RequestRecorder:
    """ASGI middleware: counts each request by route and status, logs it and traces it.

    Args:
        has_access_log: whether there is a log line for each request.
        tracer: None traces nothing.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, *, has_access_log: bool = False, tracer: "Tracer | None" = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._has_access_log = has_access_log
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in _KNOWN_METHODS else _UNKNOWN
        trace = None
        if self._tracer is not None and not scope["path"].startswith(_POLLED):
            trace = self._tracer.start_request(method, Headers(scope=scope))
        # uvicorn starts a pipelined request in the context of the one before it.
        current_run.set("")
        current_trace.set(trace)
        start_s, status = time.perf_counter(), 500

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            # The route's template, not the path: paths that clients make up would be labels without end.
            route = getattr(scope.get("route"), "path", "")
            self._record(method, route or _UNKNOWN, status, time.perf_counter() - start_s, scope)
            if trace is not None:
                trace.end(method, route, status, scope.get(SIZES, {}))

    def _record(self, method: str, route: str, status: int, duration_s: float, scope: Scope) -> None:
        self._metrics.record_request(method, route, status, duration_s)
        level = logging.DEBUG if route.startswith(_POLLED) else logging.INFO
        if self._has_access_log and _access_log.isEnabledFor(level):
            fields = {"method": method, "route": route, "status": status, "duration_s": round(duration_s, 6)}
            extra = {**fields, **scope.get(SIZES, {})}
            _access_log.log(level, "%s %s %d", method, route, status, extra=extra)
