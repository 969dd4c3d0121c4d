"""Requests that give something twice, on every route."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.http import answer, group, post, problem, rewards, running
from tests.support.trainer_requests import LLAMA_FACTORY, OPENRLHF, SLIME, VERIFY, body, send

pytestmark = pytest.mark.anyio


def operations() -> Iterator[tuple[str, str, Any]]:
    document = create_app(Settings(), LocalEngine.opener(FakePolicy)).openapi()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path.replace("{name}", "grpo"), operation


WITH_BODY = [
    (method, path)
    for method, path, operation in operations()
    if "application/json" in operation.get("requestBody", {}).get("content", {})
]
WITH_QUERY = [
    (method, path, parameter["name"])
    for method, path, operation in operations()
    for parameter in operation.get("parameters", ())
    if parameter["in"] == "query"
]


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running() as client:
        yield client


def test_the_routes_are_found() -> None:
    paths = {path for _, path in WITH_BODY}
    assert paths >= {"/score", "/labels", "/policy/update", OPENRLHF, SLIME, LLAMA_FACTORY, VERIFY}
    assert ("put", "/policy/weights", "version") in WITH_QUERY


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
async def test_a_key_that_occurs_twice(service: httpx.AsyncClient, method: str, path: str) -> None:
    """Also where keys that a trainer may add are ignored."""
    content = b'{"a": [{"b": 1, "b": 1}], "c": 2}'
    headers = {"Content-Type": "application/json"}
    answered = await service.request(method, path, content=content, headers=headers)
    assert answered.status_code == 422, answered.text
    assert "a[0].b: the key occurs twice" in answered.json()["detail"]
    assert answered.json()["code"] == "invalid_request"


@pytest.mark.parametrize(("method", "path", "name"), WITH_QUERY)
async def test_a_parameter_that_occurs_twice(
    service: httpx.AsyncClient, method: str, path: str, name: str
) -> None:
    answered = await service.request(method, path, params=[(name, "1"), (name, "0")], content=b"")
    body = problem(answered, 422, "invalid_request")
    assert body["errors"] == [{"location": name, "message": "the query parameter occurs twice"}]


@pytest.mark.parametrize("size", [0, 1000, 300_000])
async def test_two_ground_truths_in_a_group_of_any_size(service: httpx.AsyncClient, size: int) -> None:
    """Before, the last one counted."""
    one = body(group(answer(), prompt="p" * size)).removesuffix(b"}")
    content = b'{"groups": [%s}, %s, "ground_truth": {"type": "click", "name": "x"}}]}' % (one, one)
    refused = problem(await post(service, content), 422, "invalid_request")
    assert refused["errors"] == [{"location": "groups[1].ground_truth", "message": "the key occurs twice"}]
    assert (await rewards(service, answer(), prompt="p" * 100))[0]["reward"] == 0.93


async def test_a_duplicate_in_a_label_as_json(service: httpx.AsyncClient) -> None:
    """A string with JSON is refused as the object is."""
    label = '{"type": "terminate", "type": "terminate"}'
    answered = await send(service, SLIME, {"prompt": "p", "response": answer(), "label": label})
    assert "occurs twice" in problem(answered, 422, "invalid_request")["detail"]
