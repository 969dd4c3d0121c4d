"""Which training run a request belongs to, so that metrics and logs can tell runs apart.

A run's id comes as a header or, from trainers that cannot send headers, in the URL, behind a key if there is
one:

    X-Run-ID: grpo-7
    http://host:8000/run/grpo-7/dialects/slime/reward
    http://host:8000/key/<key>/run/grpo-7/dialects/slime/reward
"""

import re
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shopr1_client.errors import InvalidRequestError
from shopr1_service.http.middleware.url_prefix import prefix_pattern, take_prefix
from shopr1_service.http.problems import problem_response
from shopr1_service.http.request_context import request_id_of
from shopr1_service.monitoring.logs import current_run

RUN_HEADER = "X-Run-ID"
_SCOPE_KEY = "shopr1.run"
# It becomes a label in Prometheus and a word in logs.
_RUN = re.compile(r"[A-Za-z0-9._-]{1,64}")
IN_PATH = prefix_pattern("run")
"""Of `/run/<id>/<route>`."""


def run_of(scope: MutableMapping[str, Any]) -> str:
    """The run that the request of this ASGI scope belongs to; empty if it names none."""
    return str(scope.get(_SCOPE_KEY, ""))


class RunId:
    """ASGI middleware: takes the run's id out of the path or the header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            in_path = take_prefix(scope, IN_PATH)
            run = in_path.decode() if in_path is not None else Headers(scope=scope).get(RUN_HEADER, "")
            if run and _RUN.fullmatch(run):
                scope[_SCOPE_KEY] = run
                current_run.set(run)
            elif run or in_path is not None:
                app = problem_response(_refusal(), request_id_of(scope))
        await app(scope, receive, send)


def _refusal() -> InvalidRequestError:
    message = "a run's id must be 1 to 64 of A-Z a-z 0-9 . _ -"
    return InvalidRequestError(message, errors=[{"location": RUN_HEADER, "message": message}])
