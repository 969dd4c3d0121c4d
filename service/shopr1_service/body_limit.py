"""Refuses requests whose announced body is larger than the limit, before any of it is read."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shopr1_client.errors import TooLargeError
from shopr1_service.problems import problem_response
from shopr1_service.request_id import request_id_of


class BodyLimit:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            length = Headers(scope=scope).get("content-length", "")
            if length.isdecimal() and int(length) > self._max_body_bytes:
                detail = f"the body has {length} bytes, max_body_bytes = {self._max_body_bytes}"
                app = problem_response(TooLargeError(detail), request_id_of(scope))
        await app(scope, receive, send)
