"""503 for what cannot be served: at the end of the service, and on its last connections."""

import asyncio
from collections.abc import Callable

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shopr1_client.errors import PROBLEM_MEDIA_TYPE, NotReadyError, from_problem
from shopr1_service.http.middleware.availability import IS_RESERVE, Availability, OpenRequests
from tests.support.http import WAIT_S

pytestmark = pytest.mark.anyio
Heard = list[str]


def application(heard: Heard, has_begun: asyncio.Event) -> Starlette:
    """Waits forever, or fails with a timeout of its own, or streams without end."""

    async def wait(_request: Request) -> Response:
        has_begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            heard.append("cancelled")
            raise
        raise AssertionError

    async def own_timeout(_request: Request) -> Response:
        raise TimeoutError("its own")

    async def at_once(_request: Request) -> Response:
        return PlainTextResponse("done")

    async def stream(_request: Request) -> Response:
        async def blocks() -> object:
            yield b"a part"
            has_begun.set()
            await asyncio.Event().wait()

        return StreamingResponse(blocks())  # type: ignore[arg-type]

    routes: dict[str, Callable[[Request], object]] = {
        "/wait": wait,
        "/own": own_timeout,
        "/done": at_once,
        "/stream": stream,
        "/health/live": at_once,
    }
    return Starlette(routes=[Route(path, endpoint) for path, endpoint in routes.items()])


class OnReserve:
    """Sets the flag that the connection sets."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[IS_RESERVE] = True
        await self._app(scope, receive, send)


def scope_of(path: str) -> Scope:
    return {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}


async def nothing_more() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


def client_of(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


def problem_of(response: httpx.Response) -> NotReadyError:
    assert response.headers["Content-Type"] == PROBLEM_MEDIA_TYPE
    assert int(response.headers["Retry-After"]) >= 1
    error = from_problem(response.json(), response.status_code)
    assert isinstance(error, NotReadyError)
    assert error.status == 503
    return error


async def test_interrupted_requests_get_a_problem() -> None:
    heard, has_begun, requests = Heard(), asyncio.Event(), OpenRequests()
    async with client_of(Availability(application(heard, has_begun), requests)) as client:
        asked = [asyncio.create_task(client.get("/wait")) for _ in range(3)]
        async with asyncio.timeout(WAIT_S):
            await has_begun.wait()
            for _ in range(10):
                await asyncio.sleep(0)  # all of them have begun
            requests.interrupt()
            requests.interrupt()
            answered = await asyncio.gather(*asked)
        assert [problem_of(each).detail for each in answered] == ["the service is shutting down"] * 3
        assert heard == ["cancelled"] * 3
        assert (await client.get("/done")).text == "done"


async def test_a_timeout_of_the_application_is_its_own() -> None:
    app = Availability(application([], asyncio.Event()), OpenRequests())
    async with client_of(app) as client:
        with pytest.raises(TimeoutError, match="its own"):
            await client.get("/own")


async def test_an_answer_that_has_begun_is_cut() -> None:
    has_begun, requests, sent = asyncio.Event(), OpenRequests(), list[str]()
    app = Availability(application([], has_begun), requests)

    async def send(message: Message) -> None:
        sent.append(message["type"])

    answering = asyncio.create_task(app(scope_of("/stream"), nothing_more, send))
    async with asyncio.timeout(WAIT_S):
        await has_begun.wait()
        requests.interrupt()
        await answering
    assert sent == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize(("path", "num_messages"), [("/wait", 2), ("/stream", 2)])
async def test_requests_that_the_server_cancels_have_one_answer(path: str, num_messages: int) -> None:
    """uvicorn cancels what still runs when its own time is over."""
    has_begun, sent = asyncio.Event(), list[Message]()
    app = Availability(application([], has_begun), OpenRequests())

    async def send(message: Message) -> None:
        sent.append(message)

    answering = asyncio.create_task(app(scope_of(path), nothing_more, send))
    async with asyncio.timeout(WAIT_S):
        await has_begun.wait()
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
    assert len(sent) == num_messages
    assert sent[0]["status"] == (503 if path == "/wait" else 200)


async def test_the_last_connections_are_for_health() -> None:
    app = OnReserve(Availability(application([], asyncio.Event()), OpenRequests()))
    async with client_of(app) as client:
        assert (await client.get("/health/live")).text == "done"
        refused = await client.get("/done")
    assert problem_of(refused).detail == "too many connections are open"
    assert refused.headers["Connection"] == "close"
