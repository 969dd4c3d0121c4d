"""The application in a test: in this process, or behind a socket. And what requests are made of."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette

from shopr1_client import Client
from shopr1_service.policy.base import Policy
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.scheduling.engine_client import OpenEngine
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from shopr1_service.updates.updatable_engine import UpdatableEngine

WAIT_S = 120.0
"""Timeout of every wait. Only a failing test waits so long."""
_POLL_S = 0.01

TERMINATE = {"type": "terminate"}
CLICK = {"type": "click", "name": "add_to_cart.buy_now"}
SEARCH = {"type": "type_and_submit", "name": "nav_bar.search_input", "text": "green tea"}

PROBLEM_KEYS = {"type", "title", "status", "detail", "code", "request_id", "errors"}


def answer(action: Mapping[str, Any] = TERMINATE, rationale: str = "abcd") -> str:
    """An answer as a policy writes it; the rationale begins at character 15."""
    return json.dumps({"rationale": rationale, "action": action}, ensure_ascii=False)


def group(*completions: Any, truth: Any = TERMINATE, prompt: Any = "page", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "ground_truth": truth, "completions": list(completions), **more}


def write_recipe(directory: Path, *changes: tuple[str, str]) -> str:
    """Path of a recipe `mine`, which is Shop-R1 with these changes of its text."""
    text = (resources.files("shopr1_rewards") / "recipes" / "shop_r1.toml").read_text("utf-8")
    for old, new in [('name = "shop_r1"', 'name = "mine"'), *changes]:
        assert old in text
        text = text.replace(old, new)
    path = directory / "mine.toml"
    path.write_text(text, "utf-8")
    return str(path)


def opener_of(policy: Policy) -> OpenEngine:
    """Opens an engine that takes updates, if the policy has weights."""
    if isinstance(policy, LoadedPolicy):
        return UpdatableEngine.opener(lambda: policy)
    return LocalEngine.opener(lambda: policy)


# --- in this process --------------------------------------------------------------------------------


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@contextlib.asynccontextmanager
async def running(policy: Policy | None = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that is ready to score."""
    app = create_app(Settings(**settings), opener_of(policy or FakePolicy()))
    async with app.router.lifespan_context(app), client_of(app) as client:
        await until_ready(client)
        yield client


async def until_ready(client: httpx.AsyncClient) -> None:
    for _ in range(int(WAIT_S / _POLL_S)):
        if (await client.get("/health/ready")).is_success:
            return
        await asyncio.sleep(_POLL_S)
    raise AssertionError("the service does not become ready")


async def post(client: httpx.AsyncClient, body: Any, **headers: str) -> httpx.Response:
    """POST /score. Bytes go as they are; half surrogate pairs go as escapes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await client.post(
        "/score", content=content, headers={"Content-Type": "application/json", **headers}
    )


async def score(client: httpx.AsyncClient, *groups: Any, **more: Any) -> Any:
    """The answer to these groups."""
    response = await post(client, {"groups": groups, **more})
    assert response.status_code == 200, response.text
    return response.json()


async def rewards(client: httpx.AsyncClient, *completions: Any, **more: Any) -> list[Any]:
    """The rewards of one group."""
    answered = await score(client, group(*completions, **more))
    return list(answered["groups"][0]["rewards"])


async def metric(client: httpx.AsyncClient, name: str, **labels: str) -> float:
    """Sum over the samples of this name that have these labels."""
    text = (await client.get("/metrics")).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def problem(response: httpx.Response, status: int, code: str) -> Any:
    """The body of an answer that must be this problem, with everything that a problem must have."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    body = response.json()
    assert body.keys() == PROBLEM_KEYS
    assert (body["status"], body["code"]) == (status, code)
    assert body["type"] == f"urn:shopr1:problem:{code}"
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == response.headers["X-Request-ID"] != ""
    return body


# --- behind a socket --------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(app: Starlette, **options: Any) -> Iterator[str]:
    """The URL of a uvicorn server on the loopback interface, in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", lifespan="on", **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def served(policy: Policy | None = None, **settings: Any) -> Iterator[str]:
    """The URL of a service that is ready to score."""
    app = create_app(Settings(**settings), opener_of(policy or FakePolicy()))
    with serving(app) as url, Client(url, timeout_s=WAIT_S) as client:
        client.wait_until_ready(WAIT_S)
        yield url
