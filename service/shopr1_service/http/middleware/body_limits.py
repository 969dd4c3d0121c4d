"""Limits on a request's body, in bytes and in time. Nothing is read of a body that is refused.

A body's memory is held in the budget before it is read, and until the answer has been sent. Routes make the
hold larger when they know what the body contains.

Uploads of weights are larger and take longer than any fixed limit: each chunk of them must arrive in time.
They need a key with the admin scope; how many bytes are accepted is decided when their safetensors header is
there.
"""

import asyncio
import re
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shopr1_client.errors import OverloadedError, ProblemError, RequestTimeoutError, TooLargeError
from shopr1_service.http.problems import RETRY_AFTER_HEADER, problem_response
from shopr1_service.memory.budget import Account, Hold, MemoryBudget

EXTEND_TIMEOUT = "shopr1.extend_timeout"
"""In a request's scope: called for each chunk of a body that may take longer than the connection's
timeout."""
MEMORY = "shopr1.memory"
"""In a request's scope: the `Hold` of its memory."""
BODY_COPIES = 2
"""A body and the texts that are parsed from it."""

_STREAMED = re.compile("/policy/(weights|adapters/[^/]+)")


def is_streamed(scope: Scope) -> bool:
    """Whether a request uploads weights."""
    return scope["method"] == "PUT" and _STREAMED.fullmatch(scope["path"]) is not None


class BodyLimits:
    """ASGI middleware.

    Args:
        max_body_bytes: a longer `Content-Length` gets 413. The routes count bodies that announce no length.
        timeout_s: after which a body that is not complete gets 408.
        memory: a body that it has no room for gets 429, or 413 if it never will.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, timeout_s: float, memory: MemoryBudget) -> None:
        self._app = app
        self._memory = memory
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if is_streamed(scope):
            extend = scope.get(EXTEND_TIMEOUT, lambda: None)  # without a socket there is none
            await self._app(scope, _TimedReceive(receive, self._timeout_s, extend), send)
            return
        app = self._app
        with self._memory.hold(Account.REQUESTS) as hold:
            scope[MEMORY] = hold
            try:
                hold.resize(BODY_COPIES * self._num_body_bytes(scope))
            except ProblemError as problem:
                app = problem_response(problem)
            await app(scope, _TimedReceive(receive, self._timeout_s, hold=hold), send)

    def _num_body_bytes(self, scope: Scope) -> int:
        """Length of the body; 0 if it announces none.

        Raises:
            TooLargeError: it is too long.
        """
        length = Headers(scope=scope).get("content-length", "")
        if not length.isdecimal():
            return 0
        # Python refuses to read numbers of thousands of digits.
        if len(length) > 20 or int(length) > self._max_body_bytes:
            length = length[:20]
            raise TooLargeError(f"the body has {length} bytes, max_body_bytes = {self._max_body_bytes}")
        return int(length)


class _TimedReceive:
    """ASGI's `receive` with a timeout for the body.

    Args:
        extend: extends the connection's own timeout. With it each chunk has `timeout_s`, else the whole body.
        hold: grows with a body that has announced no length.
    """

    def __init__(
        self,
        receive: Receive,
        timeout_s: float,
        extend: Callable[[], None] | None = None,
        hold: Hold | None = None,
    ) -> None:
        self._receive = receive
        self._hold = hold
        self._num_bytes = 0
        self._extend = extend
        self._timeout_s = timeout_s
        self._due_s = asyncio.get_running_loop().time() + timeout_s
        self._is_complete = False

    async def __call__(self) -> Message:
        if self._is_complete:  # the next message is the client's disconnect
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._due_s):
                message = await self._receive()
        except TimeoutError:
            detail = f"the body did not arrive within receive_timeout_s = {self._timeout_s:g}"
            # An HTTPException: FastAPI turns any other into "the body cannot be parsed".
            raise HTTPException(RequestTimeoutError.status, detail) from None
        self._count(len(message.get("body", b"")))
        if self._extend is not None:
            self._extend()
            self._due_s = asyncio.get_running_loop().time() + self._timeout_s
        self._is_complete = not message.get("more_body", False)
        return message

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._hold is None or BODY_COPIES * self._num_bytes <= self._hold.num_bytes:
            return
        try:
            self._hold.resize(BODY_COPIES * self._num_bytes)
        except (OverloadedError, TooLargeError) as error:
            seconds = error.retry_after_s
            headers = None if seconds is None else {RETRY_AFTER_HEADER: f"{seconds:.0f}"}
            raise HTTPException(error.status, error.detail, headers) from None
