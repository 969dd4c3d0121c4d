"""Both servers give the same answers to the same requests, to the last digit."""

import json
from typing import Any

import httpx
import pytest

from shopr1_service.http import examples
from tests.integration.ray.conftest import client_of
from tests.support.http import answer, group

Request = tuple[str, str, dict[str, Any]]
"""Method, path, and further arguments of `httpx.Client.request`."""

TWO = {"groups": [group(answer(), answer(rationale="Why not?"), prompt=f"page {i}") for i in range(4)]}
LONG = {"groups": [group(answer(rationale="I look for a mug. " * 40), prompt="a mug " * 300)]}


def post(body: Any, path: str = "/score", **headers: str) -> Request:
    return "POST", path, {"json": body, "headers": headers}


def raw(content: bytes, path: str = "/score", **headers: str) -> Request:
    return "POST", path, {"content": content, "headers": {"Content-Type": "application/json", **headers}}


SCORED = {
    "text": post(examples.SCORE_REQUESTS["text"]["value"]),
    "chat, with tokens": post(examples.SCORE_REQUESTS["chat"]["value"]),
    "token ids": post(examples.SCORE_REQUESTS["token_ids"]["value"]),
    "several groups": post(TWO),
    "a long prompt": post(LONG),
    "token ids asked for": post({**TWO, "include": ["token_ids", "tokens"]}),
    "no groups": post({"groups": []}),
    "too long a sequence": post({"groups": [group(answer(), prompt="a mug " * 9000)]}),
}
REFUSED = {
    "an unknown recipe": post({**TWO, "recipe": "x"}),
    "an unknown adapter": post({**TWO, "adapter": "x"}),
    "a version that is not loaded": post({**TWO, "policy_version": "7"}),
    "a later version": post({**TWO, "policy_version": {"at_least": 7}}),
    "an unknown field": post({**TWO, "x": 1}),
    "no JSON": raw(b"{"),
    "not UTF-8": raw(b'{"\xff'),
    "deep": raw(b"[" * 100_000),
    "too large": raw(b" " * 300_000),
    "too large, in chunks": ("POST", "/score", {"content": [b" " * 100_000] * 3}),
    "a wrong method": ("GET", "/score", {}),
    "a wrong path": ("GET", "/scores", {}),
    "a malformed deadline": post(TWO, **{"X-Request-Timeout": "soon"}),
}
PATHS = ("/info", "/recipes", "/recipes/shop_r1", "/recipes/x", "/policy", "/health/live")
READ: dict[str, Request] = {path: ("GET", path, {}) for path in PATHS}
REQUESTS = SCORED | REFUSED | READ
CHANGING = {"request_id", "current", "base"}
"""Members that always differ: versions contain the time at which they were loaded."""


def answered(client: httpx.Client, request: Request) -> tuple[int, dict[str, str], Any]:
    """Status, relevant headers, and body."""
    method, path, arguments = request
    if isinstance(arguments.get("content"), list):
        arguments = {**arguments, "content": iter(arguments["content"])}
    response = client.request(method, path, **arguments)
    names = ("content-type", "retry-after", "allow", "www-authenticate")
    headers = {name: response.headers[name] for name in names if name in response.headers}
    return response.status_code, headers, _body(response)


def _body(response: httpx.Response) -> Any:
    body = json.loads(response.content) if response.content else None
    if isinstance(body, dict):
        return {name: value for name, value in body.items() if name not in CHANGING}
    return body


@pytest.mark.parametrize("name", REQUESTS)
def test_both_servers_give_the_same_answer(single: str, cluster: str, name: str) -> None:
    with client_of(single) as one, client_of(cluster) as other:
        expected = answered(one, REQUESTS[name])
        assert answered(other, REQUESTS[name]) == expected
    assert (expected[0] == 200) == (name not in REFUSED and name != "/recipes/x")


@pytest.mark.parametrize("scope", [None, "score", "admin", "metrics"])
@pytest.mark.parametrize("path", ["/score", "/info", "/policy", "/metrics", "/policy/update", "/x"])
def test_both_servers_check_keys_alike(single: str, cluster: str, scope: str | None, path: str) -> None:
    request: Request = ("POST" if path in ("/score", "/policy/update") else "GET", path, {"json": {}})
    statuses = []
    for url in (single, cluster):
        with client_of(url, scope) as client:
            statuses.append(client.request(request[0], path, **request[2]).status_code)
    assert statuses[0] == statuses[1]


def test_the_request_id_is_returned(single: str, cluster: str) -> None:
    for url in (single, cluster):
        with client_of(url) as client:
            response = client.post("/score", json=TWO, headers={"X-Request-ID": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
        assert response.json()["request_id"] == "mine-1"
