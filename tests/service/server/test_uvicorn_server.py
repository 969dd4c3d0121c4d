"""Addresses, keys, TLS; the end of a server whose device has failed."""

import contextlib
import os
import signal
import ssl
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from shopr1_client import Client
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, FatalEngineError, TokenGroup, Unmeasurable, Version
from shopr1_service.errors import SettingsError
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.server import uvicorn_server as server
from shopr1_service.settings import Settings
from tests.support.http import WAIT_S, answer, free_port, group, problem

KEY = "a-key-of-0123456789"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7", "gpu-box.example"])
def test_an_open_door_to_the_network_is_refused(host: str) -> None:
    with pytest.raises(SettingsError, match="can be reached by others, and there are no API keys"):
        server.serve(Settings(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    server.check_exposure(Settings(host=host))


@pytest.mark.parametrize("more", [{"api_keys": (KEY,)}, {"allow_unauthenticated": True}])
def test_with_a_key_or_on_demand_any_address_may_listen(more: dict[str, Any]) -> None:
    server.check_exposure(Settings(host="0.0.0.0", **more))


# --- TLS --------------------------------------------------------------------------------------------


def until_up(url: str, trusting: ssl.SSLContext) -> None:
    for _ in range(int(WAIT_S * 100)):
        with contextlib.suppress(httpx.ConnectError):
            if httpx.get(f"{url}/health/ready", verify=trusting).is_success:
                return
        threading.Event().wait(0.01)
    raise AssertionError("not ready")


def test_https(monkeypatch: pytest.MonkeyPatch, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    monkeypatch.setattr(server, "load_policy", lambda _settings, _startup: FakePolicy())
    settings = Settings(port=free_port(), tls_cert_file=cert, tls_private_key_file=key)
    url = f"https://127.0.0.1:{settings.port}"

    def ask() -> list[Any]:
        trusting = ssl.create_default_context(cafile=str(cert))
        seen: list[Any] = []
        try:
            until_up(url, trusting)
            body = {"groups": [group(answer())]}
            seen.append(httpx.post(f"{url}/score", json=body, verify=trusting, timeout=WAIT_S).status_code)
            for refused in (url, url.replace("https:", "http:")):
                with pytest.raises(httpx.TransportError) as caught:
                    httpx.get(refused)
                seen.append(type(caught.value))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
        return seen

    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask)
        assert server.serve(settings) == 0
    # One that does not know the certificate, and one that speaks plain HTTP.
    assert asked.result()[:2] == [200, httpx.ConnectError]
    assert issubclass(asked.result()[2], httpx.TransportError)


def test_certificate_and_key_come_together(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    other = tmp_path / "other.pem"
    for given, match in [
        ({"tls_cert_file": cert}, "must be given together"),
        ({"tls_private_key_file": key}, "must be given together"),
        ({"tls_cert_file": cert, "tls_private_key_file": other}, "cannot read"),
        ({"tls_cert_file": cert, "tls_private_key_file": cert}, "cannot use"),
    ]:
        with pytest.raises(SettingsError, match=match):
            server.serve(Settings(port=free_port(), **given))  # type: ignore[arg-type]


# --- idle connections -------------------------------------------------------------------------------

KEEP_ALIVES_S = {
    "aiohttp": 15.0,
    "Go and hyper": 90.0,
    "AWS and nginx": 60.0,
    "Google's load balancer": 600.0,
}
"""Defaults of clients and proxies: how long they reuse an idle connection."""


def test_clients_close_idle_connections_first(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[uvicorn.Config] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: configs.append(self.config))
    assert server.serve(Settings(port=free_port())) == 0
    httpx_s = httpx.Limits().keepalive_expiry
    assert httpx_s is not None
    assert configs[0].timeout_keep_alive > max(httpx_s, *KEEP_ALIVES_S.values())


# --- the end ----------------------------------------------------------------------------------------


class Dying(FakePolicy):
    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        raise FatalEngineError("CUDA error: an illegal memory access was encountered")


def test_a_failed_device_ends_the_server(
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
        # Without a signal it returns a code for which a supervisor restarts it.
        assert server.serve(settings) == 1
        answered = asked.result()
    assert "the engine has failed" in problem(answered, 503, "not_ready")["detail"]
    assert int(answered.headers["Retry-After"]) >= 1
    assert "an illegal memory access" in caplog.text
