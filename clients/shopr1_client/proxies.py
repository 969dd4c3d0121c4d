"""Choice of the proxy for each server, and connections that name it in their errors.

On clusters `HTTP_PROXY` is often set, and its proxy does not reach the cluster's own hosts. Loopback and
private hosts are therefore reached directly, unless a proxy is given explicitly.
"""

import contextlib
import ipaddress
import os
import re
import socket
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

import httpx

from shopr1_client.connections import AsyncTransport, Transport
from shopr1_client.errors import SettingsError

DIRECT = "direct"
"""As the choice of a proxy: none, for any server."""
SCHEMES = ("http", "https", "socks5", "socks5h")
"""Schemes of a proxy's URL."""
NOTE = "shopr1_proxy"
"""Extension of a response that came through a proxy: a sentence about the proxy."""

_PRIVATE_SUFFIXES = (".home.arpa", ".internal", ".lan", ".local", ".localhost", ".svc")
"""Ends of host names that public DNS does not have. Kubernetes' names end in `.svc` or `.cluster.local`."""

_HOST = re.compile(r"[\w.-]+|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*(%\w+)?")
_USER_INFO = re.compile(r"[^/\s,]*@")
_MAX_PORT = 65535
_GIVEN = "the setting `proxy`"
_Transport = TypeVar("_Transport")


class Proxy(NamedTuple):
    """A proxy.

    Attributes:
        url: may hold a password.
        source: where the URL was given, such as `HTTP_PROXY`.
    """

    url: str
    source: str

    def __str__(self) -> str:
        return f"the proxy {without_passwords(self.url)} of {self.source}"


class Connections(TypedDict):
    """Arguments of `httpx.Client` and `httpx.AsyncClient`."""

    transport: Any
    mounts: Mapping[str, Any]


def find_proxy(url: httpx.URL, choice: str | None) -> Proxy | None:
    """The proxy for a server; None: a direct connection.

    Args:
        choice: None: that of the environment, unless the host is private or `NO_PROXY` names it. `direct`:
            none. Else the URL of a proxy for every server.
    """
    if choice is not None:
        return None if choice == DIRECT else Proxy(choice, _GIVEN)
    if is_private(url.host) or urllib.request.proxy_bypass(url.netloc.decode("ascii")):
        return None
    proxies = urllib.request.getproxies()
    kind = next((kind for kind in (url.scheme, "all") if proxies.get(kind)), None)
    if kind is None:
        return None
    found = proxies[kind]
    return Proxy(found if "://" in found else f"http://{found}", _source(kind))


def url_flaw(url: str, schemes: Sequence[str]) -> str | None:
    """Why this is no URL of a host with one of these schemes; None: it is one."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        return str(error)
    if parsed.scheme not in schemes or not _HOST.fullmatch(parsed.host):
        return f"it must be one host, after {', '.join(f'{scheme}://' for scheme in schemes)}"
    return None if (parsed.port or 0) <= _MAX_PORT else f"there is no port {parsed.port}"


def without_passwords(urls: str) -> str:
    """URLs without users and passwords, for messages.

    >>> without_passwords("http://user@proxy:3128, http://reward")
    'http://proxy:3128, http://reward'
    """
    return _USER_INFO.sub("", urls)


def is_private(host: str) -> bool:
    """Whether a host is one of a private network: by its address, or by a name that public DNS cannot have.

    >>> [is_private(host) for host in ("10.1.2.3", "127.1", "::1", "reward", "reward.ml.svc", "example.org")]
    [True, True, True, True, True, False]
    """
    name = host.lower().rstrip(".")
    if (address := _address(name)) is not None:
        return not address.is_global
    return "." not in name or name.endswith(_PRIVATE_SUFFIXES)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is, in every form that `getaddrinfo` reads; None: it is a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        with contextlib.suppress(OSError, ValueError):
            return ipaddress.IPv4Address(socket.inet_aton(host))  # 127.1, 0x7f000001, 0177.0.0.1, 2130706433
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def sync_connections(urls: Sequence[str], choice: str | None) -> Connections:
    """Connections of a synchronous client to these servers.

    Raises:
        SettingsError: a proxy's URL is malformed, or SOCKS is not installed.
    """
    return _connections(urls, choice, Transport, _ProxiedTransport)


def async_connections(urls: Sequence[str], choice: str | None) -> Connections:
    """`sync_connections` for an asynchronous client."""
    return _connections(urls, choice, AsyncTransport, _AsyncProxiedTransport)


class _ProxiedTransport(Transport):
    def __init__(self, proxy: Proxy) -> None:
        super().__init__(proxy=proxy.url)
        self._note = _note(proxy)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            response = super().handle_request(request)
        except httpx.TransportError as error:
            raise _named(error, self._note) from error
        response.extensions[NOTE] = self._note
        return response


class _AsyncProxiedTransport(AsyncTransport):
    def __init__(self, proxy: Proxy) -> None:
        super().__init__(proxy=proxy.url)
        self._note = _note(proxy)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            response = await super().handle_async_request(request)
        except httpx.TransportError as error:
            raise _named(error, self._note) from error
        response.extensions[NOTE] = self._note
        return response


def _connections(
    urls: Sequence[str],
    choice: str | None,
    direct: type[_Transport],
    proxied: type[_ProxiedTransport] | type[_AsyncProxiedTransport],
) -> Connections:
    # A transport is given for every server, so that httpx builds none for proxies that no server needs.
    proxies = {_pattern(url): find_proxy(url, choice) for url in map(httpx.URL, urls)}
    transports = {proxy: _open(proxy, direct, proxied) for proxy in dict.fromkeys(proxies.values())}
    mounts = {pattern: transports[proxy] for pattern, proxy in proxies.items()}
    return {"transport": next(iter(transports.values())), "mounts": mounts}


def _open(
    proxy: Proxy | None,
    direct: type[_Transport],
    proxied: type[_ProxiedTransport] | type[_AsyncProxiedTransport],
) -> object:
    if proxy is None:
        return direct()
    if flaw := url_flaw(proxy.url, SCHEMES):
        raise SettingsError(f"{proxy} is malformed: {flaw}")
    try:
        return proxied(proxy)
    except ImportError:
        raise SettingsError(
            f"{proxy} speaks SOCKS, which needs the extra `socks`: install httpx[socks]"
        ) from None


def _named(error: httpx.TransportError, note: str) -> httpx.TransportError:
    return type(error)(f"{error}; {note}")


def _note(proxy: Proxy) -> str:
    advice = "" if proxy.source == _GIVEN else "; add the host to NO_PROXY to reach it directly"
    return f"through {proxy}{advice}"


def _source(kind: str) -> str:
    """The environment's variable for a kind of proxy; the system's settings if there is none."""
    names = (f"{kind}_proxy", f"{kind}_proxy".upper())
    return next((name for name in names if os.environ.get(name)), "the system's settings")


def _pattern(url: httpx.URL) -> str:
    """The servers of a URL, as a key of httpx's mounts."""
    return f"{url.scheme}://[{url.host}]" if ":" in url.host else f"{url.scheme}://{url.host}"
