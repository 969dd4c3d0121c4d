"""`server.serve` in the main thread, where signals arrive, and what clients do meanwhile in others."""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import pytest

from shopr1_client import Client
from shopr1_service.policy.base import Policy
from shopr1_service.server import uvicorn_server as server
from shopr1_service.settings import Settings
from tests.support.http import WAIT_S, answer, free_port, group

_Result = TypeVar("_Result")


class Service:
    """A service with this policy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, policy: Policy, **settings: Any) -> None:
        monkeypatch.setattr(server, "load_policy", lambda _settings, _startup: policy)
        self.settings = Settings(port=free_port(), **settings)
        self.url = f"http://127.0.0.1:{self.settings.port}"

    def serve_during(self, ask: Callable[[], _Result]) -> _Result:
        """The result of `ask`, which runs in a thread when the service is ready and has to stop it."""

        def ask_when_ready() -> _Result:
            self.ready()
            return ask()

        with ThreadPoolExecutor() as pool:
            asked = pool.submit(ask_when_ready)
            assert server.serve(self.settings) == 0
            return asked.result()

    def post(self, prompt: str = "page") -> httpx.Response:
        body = {"groups": [group(answer(), prompt=prompt)]}
        return httpx.post(f"{self.url}/score", json=body, timeout=WAIT_S)

    def ready(self) -> None:
        with Client(self.url) as client:
            client.wait_until_ready(WAIT_S)

    def stop(self) -> None:
        """Send SIGTERM; return when no connection is accepted any more."""
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(int(WAIT_S * 100)):
            try:
                httpx.get(f"{self.url}/health/live")
            except httpx.ConnectError:
                return
            except httpx.TransportError:  # it was let in at the very moment of closing
                pass
            threading.Event().wait(0.01)
        raise AssertionError("still listens")
