"""Clients on raw sockets after they have sent: they read, wait for the end, reset, or leave."""

import contextlib
import socket
import struct


def read(client: socket.socket) -> None:
    assert client.recv(12).startswith(b"HTTP/1.1 ")


def read_to_end(client: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        while client.recv(65_536):
            pass


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def leave(_client: socket.socket) -> None:
    pass
