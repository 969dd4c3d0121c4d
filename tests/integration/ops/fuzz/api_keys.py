"""Fuzzes the extraction of API keys: it never raises, and no key stays in the URL."""

import asyncio
import re
import sys
from typing import Any
from urllib.parse import parse_qsl, unquote

import atheris

with atheris.instrument_imports(
    include=["shopr1_service.http.api_keys", "shopr1_service.http.middleware.auth"]
):
    from shopr1_service.http.api_keys import ApiKeys
    from shopr1_service.http.middleware.auth import OPEN_PATHS, Authentication

from pydantic import SecretStr
from starlette.types import Message, Receive, Scope, Send

from shopr1_service.settings import Settings
from tests.integration.ops.fuzz.harness import fuzz

KEY = "a-key-of-the-service-0123456789"
SEEDS = (
    f"/key/{KEY}/score\n\n",
    f"/key/{KEY}/key/{KEY}/score%0A\n\n",
    f"/%6bey/{KEY}%2Fscore\n\n",
    f"/score\na=b&api_key={KEY}&c=%ff\n",
    f"/score\napi%5Fkey={KEY}\n",
    f"/score\n\nBearer {KEY}",
    f"/health/ready\n\nBasic {KEY}",
)


class Recorder:
    """The application behind the check, which records the requests that pass."""

    def __init__(self) -> None:
        self.statuses: list[int] = []

    async def __call__(self, _scope: Scope, _receive: Receive, _send: Send) -> None:
        self.statuses.append(200)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.statuses.append(message["status"])

    async def receive(self) -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}


def scope_of(path: str, query: str, authorization: str) -> dict[str, Any]:
    """The ASGI scope of a request, as built by uvicorn."""
    return {
        "type": "http",
        "method": "GET",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(b"authorization", authorization.encode("latin-1"))] if authorization else [],
    }


def check(keys: ApiKeys, data: bytes) -> None:
    path, query, authorization = [*data.decode("latin-1").split("\n"), "", ""][:3]
    path = "/" + re.sub("[^!-~]|[?#]", "", path).removeprefix("/")  # the characters that h11 accepts
    query = re.sub("[^!-~]", "", query)
    scope = scope_of(path, query, authorization)
    recorder = Recorder()
    asyncio.run(Authentication(recorder, keys)(scope, recorder.receive, recorder.send))
    assert recorder.statuses in ([200], [401], [403])
    if recorder.statuses == [200] and not scope["path"].startswith(OPEN_PATHS):
        assert KEY in unquote(path) + unquote(query) + authorization
    check_url(scope)


def check_url(scope: Scope) -> None:
    """Assert that no key is left in the URL."""
    assert not re.match("/key/[^/]*/", scope["path"]), scope["path"]
    assert not re.match("/key/[^/]*/", unquote(scope["raw_path"])), scope["raw_path"]
    assert "api_key" not in dict(parse_qsl(scope["query_string"].decode(), keep_blank_values=True))


def main() -> int:
    keys = ApiKeys.of(Settings(api_keys=(SecretStr(KEY),)))
    fuzz(lambda data: check(keys, data), map(str.encode, SEEDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
