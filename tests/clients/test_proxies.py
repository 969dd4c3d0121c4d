"""The choice of a proxy, against httpx's own, and what both clients do with one."""

import asyncio
import socket
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from torch import nn

from shopr1_client import AsyncClient, Client, ProblemError, SettingsError, TransportError
from shopr1_client.proxies import DIRECT, find_proxy, is_private
from shopr1_client.wire import Info
from tests.support.canned_server import answering
from tests.support.client_updates import Update, both, layer
from tests.support.http import free_port, served
from tests.support.policy_server import policy_server

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
PROXY = "http://proxy.test:3128"
PUBLIC = "http://rewards.example.org:8000"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def sync_info(url: str, **options: Any) -> Info:
    with Client(url, retry_for_s=0, **options) as client:
        return client.info()


def async_info(url: str, **options: Any) -> Info:
    return asyncio.run(AsyncClient(url, retry_for_s=0, **options).info())


GetInfo = Callable[..., Info]
each = pytest.mark.parametrize("info", [sync_info, async_info], ids=["sync", "async"])


# --- choice -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.7", True),
        ("172.16.4.1", True),
        ("172.32.4.1", False),
        ("192.168.1.9", True),
        ("169.254.1.1", True),
        ("100.64.0.1", True),
        ("fd00::7", True),
        ("fe80::1", True),
        ("8.8.8.8", False),
        ("127.1", True),
        ("127.0.1", True),
        ("10.7", True),
        ("0", True),
        ("2130706433", True),
        ("0x7f000001", True),
        ("0x7F.1", True),
        ("0177.0.0.1", True),
        ("127.0.0.1.", True),
        ("192.168.257", True),
        ("::ffff:10.0.0.7", True),
        ("::ffff:8.8.8.8", False),
        ("fe80::1%eth0", True),
        ("8.8", False),
        ("8.526344", False),
        ("134744072", False),
        ("127.1.example.org", False),
        ("300.1.2.3", False),
        ("2001:4860:4860::8888", False),
        ("node17", True),
        ("reward.ml.svc", True),
        ("reward.ml.svc.cluster.local", True),
        ("Reward.ML.svc.", True),
        ("vm.c.project.internal", True),
        ("example.org", False),
        ("svc.example.org", False),
        ("local.example.org", False),
    ],
)
def test_private_hosts(host: str, expected: bool) -> None:
    assert is_private(host) is expected


@pytest.mark.parametrize(
    "url", [PUBLIC, "https://rewards.example.org", "http://8.8.8.8", "https://rewards.example.org:444"]
)
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HTTP_PROXY": PROXY},
        {"http_proxy": "proxy.test:3128"},
        {"HTTPS_PROXY": PROXY},
        {"ALL_PROXY": PROXY},
        {"ALL_PROXY": "http://other.test:1", "HTTP_PROXY": PROXY},
        {"ALL_PROXY": PROXY, "NO_PROXY": "*"},
        {"ALL_PROXY": PROXY, "NO_PROXY": "example.org"},
        {"ALL_PROXY": PROXY, "NO_PROXY": ".example.org, 8.8.8.8"},
        {"ALL_PROXY": PROXY, "NO_PROXY": "rewards.example.org"},
        {"ALL_PROXY": PROXY, "no_proxy": "other.example.org"},
    ],
)
def test_public_hosts_have_the_proxy_that_httpx_chooses(
    url: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with httpx.Client() as client:
        pool = client._transport_for_url(httpx.URL(url))._pool  # type: ignore[attr-defined]
        expected = getattr(pool, "_proxy_url", None)
    found = find_proxy(httpx.URL(url), None)
    assert (found and httpx.URL(found.url).host) == (expected and expected.host.decode())
    assert (found and httpx.URL(found.url).port) == (expected and expected.port)
    assert found is None or found.source in environment


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "10.7"])
def test_a_short_address_connects_to_a_private_one(host: str) -> None:
    """The system's resolver reads these forms as addresses."""
    addresses = {found[4][0] for found in socket.getaddrinfo(host, 80, socket.AF_INET)}
    assert len(addresses) == 1
    assert all(is_private(str(address)) for address in addresses)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8000", "http://127.1:8000", "http://[::1]", "http://node17:8000", "https://10.1.2.3"],
)
def test_private_hosts_have_none_unless_it_is_given(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", PROXY)
    assert find_proxy(httpx.URL(url), None) is None
    given = find_proxy(httpx.URL(url), "http://given.test")
    assert given is not None
    assert given.url == "http://given.test"


def test_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", PROXY)
    assert find_proxy(httpx.URL(PUBLIC), DIRECT) is None


# --- connections ------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1", "nonsense://x"])
def test_a_service_on_this_machine_is_reached_directly(
    info: GetInfo, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with served() as url:
        assert info(url).policy.model == "fake"


@both
def test_updates_too(update: Update, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with policy_server() as server:
        update(server.url, layer(), "7")
    assert server.policy.base.version == "7"


@each
def test_a_proxy_that_is_not_there_is_named(info: GetInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("HTTP_PROXY", f"http://user:secret@{address}")  # pragma: allowlist secret
    with pytest.raises(TransportError) as caught:
        info(PUBLIC)
    assert f"through the proxy http://{address} of HTTP_PROXY" in str(caught.value)
    assert "NO_PROXY" in str(caught.value)
    assert "secret" not in str(caught.value)


@each
@pytest.mark.parametrize(
    ("status", "body"),
    [(502, b"<html>Bad gateway</html>"), (503, b"{}"), (407, b""), (403, b'{"error": "denied"}')],
)
def test_a_proxy_that_answers_itself_is_named(
    info: GetInfo, status: int, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, body) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        with pytest.raises(ProblemError) as caught:
            info(PUBLIC)
    assert caught.value.status == status
    assert f"through the proxy {proxy} of HTTP_PROXY" in caught.value.detail


@each
def test_a_page_of_a_proxy_is_named(info: GetInfo) -> None:
    with (
        answering(200, b"<html>Log in</html>") as proxy,
        pytest.raises(TransportError, match="the setting `proxy`"),
    ):
        info("http://127.0.0.1:8000", proxy=proxy)


@each
def test_a_problem_of_the_service_is_its_own(info: GetInfo) -> None:
    with (
        answering(429, b'{"code": "overloaded", "detail": "full"}') as proxy,
        pytest.raises(ProblemError) as caught,
    ):
        info(PUBLIC, proxy=proxy)
    assert caught.value.detail == "full"


@each
def test_two_servers_and_a_proxy_for_one_of_them(info: GetInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as url, answering(407, b"") as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        assert info([url, PUBLIC]).policy.model == "fake"
        with pytest.raises(ProblemError, match="the proxy"):
            info([PUBLIC, url])


@each
def test_socks_needs_an_extra(info: GetInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy.test:1080")
    with pytest.raises(SettingsError, match=r"socks5://proxy\.test:1080 of ALL_PROXY .* httpx\[socks\]"):
        info(PUBLIC)


@each
@pytest.mark.parametrize("proxy", ["nonsense://proxy.test", "http://[", ""])
def test_a_malformed_proxy_is_named(info: GetInfo, proxy: str) -> None:
    with pytest.raises(SettingsError, match="the setting `proxy` is malformed"):
        info(PUBLIC, proxy=proxy)


def test_updates_name_the_proxy() -> None:
    with (
        answering(502, b"") as proxy,
        Client(PUBLIC, proxy=proxy, retry_for_s=0) as client,
        pytest.raises(ProblemError, match="through the proxy"),
    ):
        client.update_policy(nn.Linear(2, 2), "1")
