"""How a server ends when its device is gone."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from shopr1_client import Client
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, FatalEngineError, TokenGroup, Unmeasurable, Version
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.server import uvicorn_server as server
from shopr1_service.settings import Settings
from tests.support.http import WAIT_S, answer, free_port, group, problem


class Dying(FakePolicy):
    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        raise FatalEngineError("CUDA error: an illegal memory access was encountered")


def test_a_device_that_is_gone_ends_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "load_policy", lambda _settings, _startup: Dying())
    settings = Settings(port=free_port())
    url = f"http://127.0.0.1:{settings.port}"

    def ask() -> httpx.Response:
        with Client(url) as client:
            client.wait_until_ready(WAIT_S)
        return httpx.post(f"{url}/score", json={"groups": [group(answer())]}, timeout=WAIT_S)

    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask)
        # Nobody signals it: it returns by itself, with a code that makes a supervisor start it anew.
        assert server.serve(settings) == 1
        answered = asked.result()
    assert "the engine has failed" in problem(answered, 503, "not_ready")["detail"]
    assert int(answered.headers["Retry-After"]) >= 1
    assert "an illegal memory access" in caplog.text
