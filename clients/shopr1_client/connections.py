"""Connections of both clients: requests that met the closing of their connection are sent again.

A server, or a proxy before it, may close an idle connection at the very moment at which a client uses it. The
request then has no answer, and was not read. On a connection of its own it gets one.
"""

import httpx

RESENDABLE = "shopr1_resendable"
"""Extension of a request that may be sent twice, although its method is POST."""

_SAFE_METHODS = frozenset({"GET", "HEAD"})
_MAX_RESENDS = 20
"""The most idle connections that httpx keeps: one after the other may be closed."""
_CLOSED = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


class Transport(httpx.HTTPTransport):
    """Connections of a synchronous client. One that a thread opens while the client closes is closed, too."""

    _is_closed = False

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._answer(request)
        if self._is_closed:  # httpx has forgotten the connection
            response.extensions["network_stream"].close()
            raise _closed(request)
        return response

    def close(self) -> None:
        self._is_closed = True
        super().close()

    def _answer(self, request: httpx.Request) -> httpx.Response:
        for _ in range(_MAX_RESENDS):
            seen = _Connection()
            request.extensions = {**request.extensions, "trace": seen.note}
            try:
                return super().handle_request(request)
            except _CLOSED:
                if seen.is_new or not _may_be_resent(request):
                    raise
        return super().handle_request(request)


class AsyncTransport(httpx.AsyncHTTPTransport):
    """Connections of an asynchronous client. The same for its tasks."""

    _is_closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._answer(request)
        if self._is_closed:
            await response.extensions["network_stream"].aclose()
            raise _closed(request)
        return response

    async def aclose(self) -> None:
        self._is_closed = True
        await super().aclose()

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        for _ in range(_MAX_RESENDS):
            seen = _Connection()
            request.extensions = {**request.extensions, "trace": seen.note_async}
            try:
                return await super().handle_async_request(request)
            except _CLOSED:
                if seen.is_new or not _may_be_resent(request):
                    raise
        return await super().handle_async_request(request)


class _Connection:
    """Notes whether a request opened its connection (httpcore's `trace`)."""

    is_new = False

    def note(self, event: str, _info: object) -> None:
        self.is_new |= event.endswith(".connect_tcp.started")

    async def note_async(self, event: str, info: object) -> None:
        self.note(event, info)


def _closed(request: httpx.Request) -> httpx.ReadError:
    return httpx.ReadError("the client has been closed", request=request)


def _may_be_resent(request: httpx.Request) -> bool:
    is_safe = request.method in _SAFE_METHODS or request.extensions.get(RESENDABLE, False)
    return is_safe and isinstance(request.stream, httpx.ByteStream)
