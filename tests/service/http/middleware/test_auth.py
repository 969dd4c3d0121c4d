"""Requests without a valid key get 401; a key may be in the header or the URL, and is in no log."""

import logging
from typing import Any

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shopr1_service.http.api_keys import ApiKeys
from shopr1_service.http.middleware.auth import Authentication
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.http import answer, client_of, group, problem, running, served, until_ready
from tests.support.trainer_requests import SLIME, slime

pytestmark = pytest.mark.anyio


KEY = "first.key_of-0123456789~"


OTHER = "second-key-0123456789"


NO_KEYS = [
    pytest.param({}, "/score", id="none"),
    pytest.param({"Authorization": f"Bearer {KEY}x"}, "/score", id="longer"),
    pytest.param({"Authorization": f"Bearer {KEY[:-1]}"}, "/score", id="shorter"),
    pytest.param({"Authorization": "Bearer"}, "/score", id="empty bearer"),
    pytest.param({"Authorization": f"Basic {KEY}"}, "/score", id="basic"),
    pytest.param({"Authorization": "Bearer \xe9\xff"}, "/score", id="not ASCII"),
    pytest.param({"X-API-Key": KEY}, "/score", id="another header"),
    pytest.param({}, f"/key/{KEY}x/score", id="wrong in path"),
    pytest.param({}, "/key//score", id="empty in path"),
    pytest.param({}, f"/score?api_key={KEY}x", id="wrong in query"),
    pytest.param({}, "/score?api_key=", id="empty in query"),
    pytest.param({}, f"/score?key={KEY}", id="another parameter"),
    # A key that is no key is not made good by one that is.
    pytest.param({"Authorization": "Bearer wrong"}, f"/key/{KEY}/score?api_key={KEY}", id="wrong header"),
]


KEYS = [
    pytest.param({"Authorization": f"Bearer {KEY}"}, "/score", id="bearer"),
    pytest.param({"Authorization": f"bearer  {OTHER} "}, "/score", id="any case"),
    pytest.param({}, f"/key/{KEY}/score", id="path"),
    pytest.param({}, f"/key/{OTHER}/score", id="the other"),
    pytest.param({}, f"/score?api_key={KEY}", id="query"),
    pytest.param({}, f"/score?a=b&api_key={KEY}&c=d", id="among others"),
    pytest.param({"Authorization": "Basic eHg6eXk="}, f"/key/{KEY}/score", id="somebody else's header"),
]


BODY = {"groups": [group(answer())]}


def keyed(**more: Any) -> Settings:
    return Settings(api_keys=f"{KEY}, {OTHER}", **more)  # type: ignore[arg-type]  # as the environment has it


@pytest.mark.parametrize(("headers", "path"), KEYS)
async def test_a_key_gets_in(headers: dict[str, str], path: str) -> None:
    async with running(api_keys=(KEY, OTHER)) as client:
        answered = await client.post(path, json=BODY, headers=headers)
    assert answered.status_code == 200, answered.text


@pytest.mark.parametrize(("headers", "path"), NO_KEYS)
async def test_nothing_else_does(headers: dict[str, str], path: str) -> None:
    async with running(api_keys=(KEY, OTHER)) as client:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        answered = await client.post(path, json=BODY, headers=raw)
    problem(answered, 401, "unauthenticated")
    assert answered.headers["WWW-Authenticate"] == "Bearer"
    assert KEY not in answered.text


async def test_every_route_but_health_requires_a_key() -> None:
    app = create_app(keyed(), LocalEngine.opener(FakePolicy))
    async with app.router.lifespan_context(app), client_of(app) as client:
        for path, methods in app.openapi()["paths"].items():
            for method, operation in methods.items():
                answered = await client.request(method, path)
                assert (answered.status_code == 401) == (not path.startswith("/health/")), path
                assert ("401" in operation["responses"]) == (not path.startswith("/health/")), path
        for path in ("/docs", "/openapi.json", "/nowhere"):
            problem(await client.get(path), 401, "unauthenticated")


async def test_a_large_body_is_not_looked_at_without_a_key() -> None:
    async with running(api_keys=(KEY,), max_body_bytes=10) as client:
        problem(await client.post("/score", json=BODY), 401, "unauthenticated")
        problem(await client.post(f"/key/{KEY}/score", json=BODY), 413, "too_large")


async def test_without_keys_the_same_urls_work() -> None:
    async with running() as client:
        answers = [
            await client.post(path, json=BODY) for path in ("/score", "/key/any/score", "/score?api_key=")
        ]
    assert [answered.status_code for answered in answers] == [200, 200, 200]


async def test_a_trainer_that_is_configured_with_only_a_url() -> None:
    async with running(api_keys=(KEY,)) as client:
        problem(await client.post(SLIME, json=slime()), 401, "unauthenticated")
        assert (await client.post(f"/key/{KEY}{SLIME}", json=slime())).status_code == 200
        # The route's own parameters stay.
        path = f"/key/{KEY}{SLIME}?object=true"
        assert "reward" in (await client.post(path, json=slime())).json()


def test_no_log_contains_a_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    # uvicorn's access log, which writes each request's URL.
    with served(api_keys=(KEY,), log_level="debug") as url:
        for path in (f"/key/{KEY}/nowhere", f"/nowhere?x=1&api_key={KEY}", f"/key/{KEY}x/nowhere"):
            assert httpx.get(url + path).status_code in (401, 404)
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert any("/nowhere?x=1" in record.getMessage() for record in ours)
    assert not any(KEY in record.getMessage() for record in ours)


@pytest.mark.parametrize(
    "target",
    [
        f"/key/{KEY}/score",
        f"/key/{KEY}/score%0A",
        f"/%6bey/{KEY}%2Fscore",
        f"/key/{KEY}/key/{KEY}/score",
        f"/key/first/key/{KEY}/score?api_key={KEY}",
        f"/score?api%5Fkey={KEY}&x=1",
        f"/score?api_key={KEY}&api_key={KEY}",
    ],
)
async def test_nothing_behind_sees_a_key(target: str) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        seen.append(scope)
        await Response()(scope, _receive, send)

    transport = httpx.ASGITransport(Authentication(app, ApiKeys.of(keyed())))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get(target)).status_code == 200
    assert KEY not in repr(seen)


@pytest.mark.parametrize(
    ("keys", "headers", "status"),
    [
        pytest.param((KEY,), {}, 401, id="missing"),
        pytest.param((KEY,), {"Authorization": f"Bearer {OTHER}"}, 401, id="wrong"),
        pytest.param((f"metrics:{KEY}",), {"Authorization": f"Bearer {KEY}"}, 403, id="for metrics only"),
    ],
)
async def test_every_route_refuses_unauthorised_requests(
    keys: tuple[str, ...], headers: dict[str, str], status: int
) -> None:
    app = create_app(Settings(api_keys=keys), LocalEngine.opener(FakePolicy))  # type: ignore[arg-type]
    async with app.router.lifespan_context(app), client_of(app) as client:
        await until_ready(client)
        routes = [(path, method) for path, ops in app.openapi()["paths"].items() for method in ops]
        assert len(routes) > 15
        for path, method in [*routes, ("/docs", "get"), ("/nowhere", "get"), ("/score", "options")]:
            for spelling in (path, f"/run/r1{path}", f"{path}/", f"/{path}", path.upper()):
                answered = await client.request(method, spelling, headers=headers)
                if path.startswith("/health/"):
                    assert answered.status_code in (200, 401, 403, 404, 405, 307), spelling
                elif (path, status) == ("/metrics", 403) and spelling in (path, "/run/r1/metrics"):
                    assert answered.status_code in (200, 403), spelling
                else:
                    assert answered.status_code == status, (method, spelling)
