"""The sockets on which the service listens.

They are opened before anything is loaded. uvicorn opens its own only when the application has started, and
ends the process with an exit code of its own if it cannot.
"""

import errno
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from shopr1_service.errors import SettingsError


@contextmanager
def listening(host: str, port: int, backlog: int) -> Iterator[list[socket.socket]]:
    """Listening sockets on every address of a host.

    Args:
        host: a name or an address; empty: all addresses.
        port: 0: a free one, which may differ from address to address.

    Raises:
        SettingsError: there is no such host, it is not this machine's, or the port is in use or not allowed.
    """
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        errors: list[OSError] = []
        for family, address in _addresses(host, port):
            try:
                sockets.append(stack.enter_context(_open(family, address, backlog)))
            except OSError as error:
                # An address that this machine has not, such as localhost's ::1 in a container without IPv6.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise SettingsError(_message(host, port, error)) from error
                errors.append(error)
        if not sockets:
            raise SettingsError(_message(host, port, errors[0])) from errors[0]
        yield sockets


def url(listener: socket.socket, host: str, *, is_tls: bool) -> str:
    """The URL of a service that listens there, by the name that the settings have for it."""
    scheme, name = "https" if is_tls else "http", f"[{host}]" if ":" in host else host or "0.0.0.0"
    return f"{scheme}://{name}:{listener.getsockname()[1]}"


def _addresses(host: str, port: int) -> Sequence[tuple[socket.AddressFamily, Any]]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # of the resolver; of a name that cannot be one
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"host: {host!r} is no address of this machine: {reason}") from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _open(family: socket.AddressFamily, address: Any, backlog: int) -> socket.socket:  # noqa: ANN401  # of a family
    return socket.create_server(address, family=family, backlog=backlog)


def _message(host: str, port: int, error: OSError) -> str:
    reason = (error.strerror or str(error)).partition(" (while")[0]
    key, value = ("host", repr(host)) if error.errno == errno.EADDRNOTAVAIL else ("port", str(port))
    where = "" if key == "host" else f" on host {host!r}"
    return f"{key}: cannot listen on {value}{where}: {reason}"
