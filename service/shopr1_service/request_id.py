"""Request ids, accepted and echoed as `X-Request-ID`, and the record of every request."""

import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shopr1_service.metrics import Metrics

REQUEST_ID_HEADER = "X-Request-ID"
_SCOPE_KEY = "shopr1.request_id"
# What is echoed goes into logs: nothing that could forge a line.
_ACCEPTED = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_UNKNOWN = "unknown"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """The id of the request that this ASGI scope belongs to."""
    return str(scope.get(_SCOPE_KEY, ""))


class RequestRecorder:
    """ASGI middleware: gives each request its id and counts it by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _ACCEPTED.fullmatch(given) else uuid.uuid4().hex
        scope[_SCOPE_KEY] = request_id
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
            method = scope["method"] if scope["method"] in _METHODS else _UNKNOWN
            duration_s = time.perf_counter() - start_s
            self._metrics.record_request(method, route, status, duration_s)
