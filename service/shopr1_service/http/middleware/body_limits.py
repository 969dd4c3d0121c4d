"""How a request's body comes in: bounded in bytes and in time, and nothing is read of one that is refused.

Weights are larger than any bound, and take as long as they take: of them every piece must come in time. Only
who has an admin's key gets so far; how much of them is taken is decided when their header has come.
"""

import asyncio
import re
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shopr1_client.errors import RequestTimeoutError, TooLargeError
from shopr1_service.http.problems import problem_response
from shopr1_service.http.request_context import request_id_of

MORE_TIME = "shopr1.more_time"
"""In a request's scope: to be called by whoever lets a body take longer, each time that a piece has come."""

_STREAMED = re.compile("/policy/(weights|adapters/[^/]+)")


def is_streamed(scope: Scope) -> bool:
    """Whether a request's body is weights."""
    return scope["method"] == "PUT" and _STREAMED.fullmatch(scope["path"]) is not None


class BodyLimits:
    """ASGI middleware.

    Args:
        max_body_bytes: what announces more gets 413. The routes count what is streamed without a length.
        timeout_s: after which a body that has not come whole gets 408.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if is_streamed(scope):
            await self._app(
                scope, _InTime(receive, self._timeout_s, scope.get(MORE_TIME, _no_connection)), send
            )
            return
        app = self._refusal(scope) or self._app
        await app(scope, _InTime(receive, self._timeout_s), send)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        length = Headers(scope=scope).get("content-length", "")
        # Python refuses to read numbers of thousands of digits.
        if length.isdecimal() and (len(length) > 20 or int(length) > self._max_body_bytes):
            length = length[:20]
            detail = f"the body has {length} bytes, max_body_bytes = {self._max_body_bytes}"
            return problem_response(TooLargeError(detail), request_id_of(scope))
        return None


def _no_connection() -> None:
    """Where the application is called without a socket."""


class _InTime:
    """ASGI's `receive`, as long as there is time for the body.

    Args:
        more_time: of the connection; given, every piece has `timeout_s`, else all of the body together.
    """

    def __init__(
        self, receive: Receive, timeout_s: float, more_time: Callable[[], None] | None = None
    ) -> None:
        self._receive = receive
        self._more_time = more_time
        self._timeout_s = timeout_s
        self._due_s = asyncio.get_running_loop().time() + timeout_s
        self._is_whole = False

    async def __call__(self) -> Message:
        if self._is_whole:  # what comes now is that the client goes
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._due_s):
                message = await self._receive()
        except TimeoutError:
            detail = f"the body did not come within receive_timeout_s = {self._timeout_s:g}"
            # As an HTTPException: FastAPI takes every other for a body that cannot be parsed.
            raise HTTPException(RequestTimeoutError.status, detail) from None
        if self._more_time is not None:
            self._more_time()
            self._due_s = asyncio.get_running_loop().time() + self._timeout_s
        self._is_whole = not message.get("more_body", False)
        return message
