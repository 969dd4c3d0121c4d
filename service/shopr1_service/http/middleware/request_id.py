"""Request ids, accepted and echoed as `X-Request-ID`, and the record of every request."""

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shopr1_service.http.request_context import _SCOPE_KEY, KNOWN_METHODS, REQUEST_ID_HEADER, sizes_of
from shopr1_service.monitoring.logs import current_request_id, current_run, log_access
from shopr1_service.monitoring.metrics import Metrics

# What is echoed goes into logs: nothing that could forge a line.
_ACCEPTED = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_UNKNOWN = "unknown"


class RequestRecorder:
    """ASGI middleware: gives each request its id, counts it by route and status, and logs it.

    Args:
        has_access_log: whether there is a line for each request.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, has_access_log: bool = False) -> None:
        self._app = app
        self._metrics = metrics
        self._has_access_log = has_access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _ACCEPTED.fullmatch(given) else uuid.uuid4().hex
        scope[_SCOPE_KEY] = request_id
        # Never taken back: each request is a task of its own, and a server may log what becomes of it.
        current_request_id.set(request_id)
        current_run.set("")
        start_s, status = time.perf_counter(), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            # The route's template, not the path: what strangers make up would be labels without end.
            route = getattr(scope.get("route"), "path", _UNKNOWN)
            method = scope["method"] if scope["method"] in KNOWN_METHODS else _UNKNOWN
            duration_s = time.perf_counter() - start_s
            self._metrics.record_request(method, route, status, duration_s)
            if self._has_access_log:
                log_access(method, route, status, duration_s, sizes_of(scope))
