"""API keys of requests.

A key is sent as a bearer token or, by trainers that cannot send headers, in the URL:

    Authorization: Bearer <key>
    http://host:8000/key/<key>/dialects/slime/reward         before any route
    http://host:8000/dialects/slime/reward?api_key=<key>

URLs end up in other people's logs: a header is better where it can be sent. This service's own logs and spans
hold no key: it is taken out of the URL before anything else reads it.
"""

from collections.abc import MutableMapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from shopr1_client.errors import ForbiddenError, ProblemError, UnauthenticatedError
from shopr1_service.http.api_keys import ApiKeys, Scope
from shopr1_service.http.middleware.run_id import RUN_IN_PATH, prefix_pattern, take_prefix
from shopr1_service.http.problems import problem_response

OPEN_PATHS = "/health/"
"""Supervisors and load balancers have no keys."""
METRICS_PATH = "/metrics"
ADMIN_PREFIX = "/policy/"
ADMIN_PATHS = frozenset(
    {
        *("/update_weights_from_disk", "/pause_generation", "/continue_generation", "/flush_cache"),
        *("/load_lora_adapter", "/unload_lora_adapter", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    }
)
"""Routes that change the policy."""
QUERY_NAME = "api_key"

_IN_PATH = prefix_pattern("key")


class Authentication:
    """ASGI middleware: 401 without a valid key, 403 with one whose scopes do not cover the route."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            given = _take_key(scope)
            problem = self._problem(scope["path"], given)
            if problem is not None:
                app = problem_response(problem, {"WWW-Authenticate": "Bearer"})
        await app(scope, receive, send)

    def _problem(self, path: str, given: bytes | None) -> ProblemError | None:
        if path.startswith(OPEN_PATHS):
            return None
        scopes, needed = self._keys.scopes(given), _needed(path)
        if not scopes:
            reason = "no API key" if given is None else "not a valid API key"
            return UnauthenticatedError(f"{reason}; send `Authorization: Bearer <key>`")
        if needed not in scopes:
            return ForbiddenError(f"this key is for {', '.join(sorted(scopes))}, not for {needed}")
        return None


def _needed(path: str) -> Scope:
    # Routes match paths literally, except for the run's id, which is taken out later: no other spelling of a
    # path reaches another route than the one that is checked here.
    route = {"path": path}
    take_prefix(route, RUN_IN_PATH)
    path = route["path"]
    if path in ADMIN_PATHS or path.startswith(ADMIN_PREFIX):
        return Scope.ADMIN
    return Scope.METRICS if path == METRICS_PATH else Scope.SCORE


def _take_key(scope: MutableMapping[str, Any]) -> bytes | None:
    """The key of a request: from the header, else the path, else the query; the URL loses it."""
    in_query = _take_from_query(scope)
    in_path = take_prefix(scope, _IN_PATH)
    scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip().encode("latin-1")
    return in_path if in_path is not None else in_query


def _take_from_query(scope: MutableMapping[str, Any]) -> bytes | None:
    query: str = scope["query_string"].decode("latin-1")
    pairs = parse_qsl(query, keep_blank_values=True)
    keys = [value for name, value in pairs if name == QUERY_NAME]
    if not keys:
        return None
    scope["query_string"] = urlencode([pair for pair in pairs if pair[0] != QUERY_NAME]).encode("latin-1")
    return keys[0].encode()
