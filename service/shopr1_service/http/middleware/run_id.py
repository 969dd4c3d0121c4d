"""The training run that a request belongs to, so that metrics and logs can tell runs apart.

A run's id is sent as a header or, by trainers that cannot send headers, in the URL, behind a key if there is
one:

    X-Run-ID: grpo-7
    http://host:8000/run/grpo-7/dialects/slime/reward
    http://host:8000/key/<key>/run/grpo-7/dialects/slime/reward
"""

import re
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shopr1_client.errors import InvalidRequestError
from shopr1_service.field_errors import field_problem
from shopr1_service.http.problems import problem_response
from shopr1_service.monitoring.logs import current_run

RUN_HEADER = "X-Run-ID"
# It becomes a label in Prometheus and a word in logs.
_RUN = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MESSAGE = "a run's id must be 1 to 64 of A-Z a-z 0-9 . _ -"


def prefix_pattern(name: str) -> re.Pattern[bytes]:
    """Pattern of `/<name>/<value>/<route>`. Of several values in a row the last counts; all are removed."""
    word = name.encode()
    return re.compile(rb"(?:/%s/([^/]*))+?(/(?!%s/[^/]*/).*)" % (word, word), re.DOTALL)


def take_prefix(scope: MutableMapping[str, Any], pattern: re.Pattern[bytes]) -> bytes | None:
    """The value in the path of an ASGI scope, which loses it; None if there is none."""
    match = pattern.fullmatch(scope["path"].encode())
    if match is None:
        return None
    scope["path"] = match[2].decode()
    # Quoted again: the value may have been sent with escapes.
    scope["raw_path"] = quote(scope["path"]).encode()
    return bytes(match[1])


RUN_IN_PATH = prefix_pattern("run")


class RunId:
    """ASGI middleware: takes the run's id out of the path or the header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            in_path = take_prefix(scope, RUN_IN_PATH)
            run = in_path.decode() if in_path is not None else Headers(scope=scope).get(RUN_HEADER, "")
            if run and _RUN.fullmatch(run):
                current_run.set(run)
            elif run or in_path is not None:
                app = problem_response(field_problem(InvalidRequestError, RUN_HEADER, _MESSAGE))
        await app(scope, receive, send)
