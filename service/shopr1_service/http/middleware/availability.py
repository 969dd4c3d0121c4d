"""503 for requests that this process cannot serve: it ends, or it runs out of file descriptors.

The client sends them again, to the next process or a little later.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shopr1_client.errors import NotReadyError
from shopr1_service.errors import RETRY_AFTER_S
from shopr1_service.http.middleware.auth import OPEN_PATHS
from shopr1_service.http.problems import problem_response

IS_RESERVE = "shopr1.is_reserve"
"""In a request's scope: its connection is one of the last that this process can open."""


_ENDING = problem_response(NotReadyError("the service is shutting down", retry_after_s=RETRY_AFTER_S))


class OpenRequests:
    """The requests that are being served."""

    def __init__(self) -> None:
        self._timeouts = set[asyncio.Timeout]()

    def begin(self) -> asyncio.Timeout:
        """A timeout for a request, which expires when all are interrupted."""
        timeout = asyncio.timeout(None)
        self._timeouts.add(timeout)
        return timeout

    def end(self, timeout: asyncio.Timeout) -> None:
        self._timeouts.discard(timeout)

    def interrupt(self) -> None:
        """End all, such as uploads that would not arrive in time. Called from the event loop."""
        now_s = asyncio.get_running_loop().time()
        for timeout in self._timeouts:
            if not timeout.expired():
                timeout.reschedule(now_s)


class Availability:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, open_requests: OpenRequests) -> None:
        self._app = app
        self._open_requests = open_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope.get(IS_RESERVE, False) and not scope["path"].startswith(OPEN_PATHS):
            problem = NotReadyError("too many connections are open", retry_after_s=RETRY_AFTER_S)
            await problem_response(problem, {"Connection": "close"})(scope, receive, send)
        else:
            await self._until_interrupted(scope, receive, send)

    async def _until_interrupted(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def send_noting_start(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        timeout = self._open_requests.begin()
        try:
            async with timeout:
                await self._app(scope, receive, send_noting_start)
        except TimeoutError:
            if not timeout.expired():
                raise
            if not has_started:
                await _ENDING(scope, receive, send)
        except asyncio.CancelledError:
            # A server whose time is over cancels what still runs. Without an answer it would send a bare 500,
            # which no client repeats.
            if not has_started:
                await _ENDING(scope, receive, send)
            raise
        finally:
            self._open_requests.end(timeout)
