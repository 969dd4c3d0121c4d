"""Request ids, and the life cycle of the application: loading, shutdown, a policy that cannot be loaded."""

import asyncio
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from shopr1_service.errors import PolicyError
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.held import Loader
from tests.support.http import (
    WAIT_S,
    answer,
    client_of,
    post,
    problem,
    rewards,
    running,
    until_ready,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running() as client:
        yield client


@pytest.mark.parametrize("given", ["7", "bug-1", "a/b:c=d@e+f._-", "x" * 128])
async def test_a_request_id_is_echoed(service: httpx.AsyncClient, given: str) -> None:
    right = await post(service, {"groups": []}, **{"X-Request-ID": given})
    wrong = await post(service, {}, **{"X-Request-ID": given})
    for response in (right, wrong):
        assert response.headers.get_list("X-Request-ID") == [given]
        assert response.json()["request_id"] == given


@pytest.mark.parametrize(
    "given",
    ["", " ", "a b", "x" * 129, "a\nERROR forged", "a\r\nX: y", "a\x1b[2J", "\xe9", 'a"b', "a\\nb", "a\n"],
)
async def test_an_id_that_could_forge_a_log_line_is_replaced(service: httpx.AsyncClient, given: str) -> None:
    headers = {b"X-Request-ID": given.encode("latin-1")}
    response = await service.post("/score", content=b"{}", headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", problem(response, 422, "invalid_request")["request_id"])


async def test_request_ids_differ(service: httpx.AsyncClient) -> None:
    responses = [await post(service, {"groups": []}) for _ in range(20)]
    request_ids = {response.headers["X-Request-ID"] for response in responses}
    assert len(request_ids) == 20
    assert request_ids == {response.json()["request_id"] for response in responses}


@pytest.mark.parametrize("path", ["/health/live", "/metrics", "/openapi.json", "/recipes", "/info", "/nope"])
async def test_every_answer_has_a_request_id(service: httpx.AsyncClient, path: str) -> None:
    response = await service.get(path, headers={"X-Request-ID": "mine"})
    assert response.headers.get_list("X-Request-ID") == ["mine"]


def assert_not_ready(response: httpx.Response, detail: str) -> None:
    assert problem(response, 503, "not_ready")["detail"].startswith(detail)
    assert int(response.headers["Retry-After"]) > 0


async def test_live_but_not_ready_while_the_policy_loads() -> None:
    load = Loader()
    app = create_app(Settings(), LocalEngine.opener(load))
    async with app.router.lifespan_context(app), client_of(app) as client:
        try:
            for response in (
                await client.get("/health/ready"),
                await client.get("/info"),
                await post(client, {"groups": []}),
            ):
                assert_not_ready(response, "the policy is loading")
            assert (await client.get("/health/live")).json() == {"status": "live"}
            for path in ("/recipes", "/recipes/shop_r1", "/metrics"):
                assert (await client.get(path)).status_code == 200
            assert (await post(client, {})).status_code == 422
        finally:
            load.may_go_on.set()
        await until_ready(client)
        assert (await rewards(client, answer()))[0]["reward"] == 0.93


async def test_not_ready_after_shutdown() -> None:
    app = create_app(Settings(), LocalEngine.opener(FakePolicy))
    async with client_of(app) as client:
        async with app.router.lifespan_context(app):
            await until_ready(client)
        assert_not_ready(await post(client, {"groups": []}), "the service is shutting down")
        assert_not_ready(await client.get("/health/ready"), "the service is shutting down")
        assert (await client.get("/health/live")).status_code == 200


async def test_shutdown_while_the_policy_loads() -> None:
    failures: list[BaseException] = []
    load = Loader()
    app = create_app(Settings(), LocalEngine.opener(load), on_failure=failures.append)
    async with client_of(app) as client:
        try:
            async with app.router.lifespan_context(app):
                assert (await client.get("/health/ready")).status_code == 503
        finally:
            load.may_go_on.set()
        assert_not_ready(await client.get("/health/ready"), "the service is shutting down")
    assert not failures


@pytest.mark.parametrize(
    "error", [PolicyError("no such directory: /x"), RuntimeError("bug"), OSError(5, "io")]
)
async def test_load_failure(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    failures: list[BaseException] = []
    has_failed = asyncio.Event()

    def load() -> FakePolicy:
        raise error

    def on_failure(failure: BaseException) -> None:
        failures.append(failure)
        has_failed.set()

    app = create_app(Settings(), LocalEngine.opener(load), on_failure=on_failure)
    async with app.router.lifespan_context(app), client_of(app) as client:
        await asyncio.wait_for(has_failed.wait(), WAIT_S)
        assert (await client.get("/health/ready")).status_code == 503
        assert (await client.get("/health/live")).status_code == 200
    assert failures == [error]
    assert f"the policy cannot be loaded: {error}" in caplog.text
