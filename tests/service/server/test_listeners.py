"""Sockets that are opened before anything is loaded."""

import errno
import socket
from typing import Any

import pytest

from shopr1_service.errors import SettingsError
from shopr1_service.server import listeners, uvicorn_server
from shopr1_service.server.listeners import listening, url
from shopr1_service.settings import Settings
from tests.support.http import WAIT_S, free_port

LOOPBACK = "127.0.0.1"


def connects(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, WAIT_S).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_free_port() -> None:
    with listening(LOOPBACK, 0, 1) as [listener]:
        address = listener.getsockname()
        assert connects(address)
        assert url(listener, LOOPBACK, is_tls=False) == f"http://127.0.0.1:{address[1]}"
        assert url(listener, "::1", is_tls=True) == f"https://[::1]:{address[1]}"
        assert url(listener, "", is_tls=False) == f"http://0.0.0.0:{address[1]}"
    assert not connects(address)


@pytest.mark.parametrize("host", [LOOPBACK, "localhost", "0.0.0.0", ""])
def test_a_port_in_use(host: str) -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SettingsError) as caught, listening(host, port, 1):
            pass
    assert str(caught.value) == f"port: cannot listen on {port} on host {host!r}: Address already in use"


def test_a_port_that_is_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> socket.socket:
        raise PermissionError(errno.EACCES, "Permission denied (while attempting to bind on address …)")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(SettingsError) as caught, listening(LOOPBACK, 80, 1):
        pass
    assert str(caught.value) == "port: cannot listen on 80 on host '127.0.0.1': Permission denied"


def test_an_address_of_another_machine() -> None:
    with pytest.raises(SettingsError) as caught, listening("192.0.2.7", 0, 1):  # for documentation, RFC 5737
        pass
    assert str(caught.value) == "host: cannot listen on '192.0.2.7': Cannot assign requested address"


@pytest.mark.parametrize("host", ["no such host", "x" * 300, "a..b", "reward.invalid"])
def test_a_host_that_does_not_exist(host: str) -> None:
    with pytest.raises(SettingsError) as caught, listening(host, 0, 1):
        pass
    assert str(caught.value).startswith(f"host: {host!r} is no address of this machine: ")


def test_a_host_name_with_an_address_that_the_machine_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As localhost in a container without IPv6."""
    addresses = [(socket.AF_INET, ("192.0.2.7", 0)), (socket.AF_INET, (LOOPBACK, 0))]
    monkeypatch.setattr(listeners, "_addresses", lambda _host, _port: addresses)
    with listening("localhost", 0, 1) as [listener]:
        assert listener.getsockname()[0] == LOOPBACK


def test_a_failure_closes_the_other_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_port()
    with socket.create_server((LOOPBACK, 0)) as other:
        addresses = [(socket.AF_INET, (LOOPBACK, free)), (socket.AF_INET, other.getsockname())]
        monkeypatch.setattr(listeners, "_addresses", lambda _host, _port: addresses)
        with pytest.raises(SettingsError), listening("localhost", 0, 1):
            pass
    assert not connects((LOOPBACK, free))


def test_the_server_opens_them_before_it_loads_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[object] = []
    monkeypatch.setattr(uvicorn_server, "load_policy", lambda *args: loads.append(args))
    with (
        socket.create_server((LOOPBACK, 0)) as other,
        pytest.raises(SettingsError, match=r"^port: cannot listen on \d+ on host '127.0.0.1': Address alr"),
    ):
        uvicorn_server.serve(Settings(port=other.getsockname()[1]))
    assert not loads
