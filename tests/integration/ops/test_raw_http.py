"""Malformed and unusual HTTP, byte by byte: it is rejected or dropped without leaks."""

import json
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.support.fake_server import HELD
from tests.support.http import WAIT_S
from tests.support.process import FAKE, Process, Resources, process, request

BODY = json.dumps(request()).encode()
SCORE = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CLOSE = b"Connection: close\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
ALL = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)

NOTHING = -1
"""The connection is closed without a response."""


def get(line: bytes, *headers: bytes) -> bytes:
    return b"".join([line, b"\r\nHost: x\r\n", *(header + b"\r\n" for header in headers), CLOSE, b"\r\n"])


def post(*headers: bytes, body: bytes = BODY) -> bytes:
    return b"".join([SCORE, CLOSE, *headers, b"\r\n", body])


def typed(content_type: bytes, body: bytes = BODY) -> bytes:
    line = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n"
    return line % (content_type, len(body)) + CLOSE + b"\r\n" + body


# Requests and the expected status.
WHOLE: dict[str, tuple[bytes, int]] = {
    # the line
    "no words": (b"\r\n\r\n\r\n", 400),
    "one word": (b"GARBAGE\r\n\r\n", 400),
    "no version": (b"GET /info\r\n\r\n", 400),
    "HTTP/3.0": (b"GET /info HTTP/3.0\r\n" + CLOSE + b"\r\n", 200),
    "HTTP/1.0": (b"GET /info HTTP/1.0\r\n\r\n", 200),
    "a space too many": (get(b"GET  /info HTTP/1.1"), 400),
    "a method of control characters": (get(b"G\x01T /info HTTP/1.1"), 400),
    "a path with NUL": (get(b"GET /in\0fo HTTP/1.1"), 400),
    "a path that is not ASCII": (get("GET /é HTTP/1.1".encode()), 400),
    "a path with an escaped NUL": (get(b"GET /recipes/%00 HTTP/1.1"), 404),
    "a path with broken escapes": (get(b"GET /recipes/%zz%f HTTP/1.1"), 404),
    "a path that is not UTF-8": (get(b"GET /recipes/%ff%fe HTTP/1.1"), 404),
    "a path that climbs": (get(b"GET /recipes/../../etc/passwd HTTP/1.1"), 404),
    "an absolute URL": (get(b"GET http://elsewhere/info HTTP/1.1"), 404),
    "an asterisk": (get(b"OPTIONS * HTTP/1.1"), 404),
    "CONNECT": (get(b"CONNECT elsewhere:443 HTTP/1.1"), 404),
    "a long path": (get(b"GET /" + b"a" * 60_000 + b" HTTP/1.1"), 404),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 404),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2, 400),
    "a web socket": (get(b"GET /score HTTP/1.1", b"Upgrade: websocket", b"Connection: Upgrade"), 405),
    # methods
    "HEAD": (get(b"HEAD /info HTTP/1.1"), 405),
    "TRACE": (get(b"TRACE /info HTTP/1.1"), 405),
    "an unknown method": (get(b"BREW /info HTTP/1.1"), 405),
    # headers
    "a header with NUL": (get(b"GET /info HTTP/1.1", b"X: a\0b"), 400),
    "a header without a name": (get(b"GET /info HTTP/1.1", b": x"), 400),
    "a header without a colon": (get(b"GET /info HTTP/1.1", b"nonsense"), 400),
    "a space before the colon": (get(b"GET /info HTTP/1.1", b"X : a"), 400),
    "a folded header": (get(b"GET /info HTTP/1.1", b"X: a\r\n b"), 200),
    "no host": (b"GET /info HTTP/1.1\r\n\r\n", 400),
    "two hosts": (get(b"GET /info HTTP/1.1", b"Host: y"), 400),
    "a host that is none": (b"GET /info HTTP/1.1\r\nHost: [\r\nConnection: close\r\n\r\n", 200),
    "two request ids": (get(b"GET /info HTTP/1.1", b"X-Request-ID: a", b"X-Request-ID: b"), 200),
    "two timeouts": (post(LENGTH, b"X-Request-Timeout: 9", b"\r\nX-Request-Timeout: 8\r\n"), 200),
    "an endless timeout": (post(LENGTH, b"X-Request-Timeout: inf\r\n"), 422),
    "expect": (post(LENGTH, b"Expect: the-unexpected\r\n"), 200),
    # lengths
    "a length that is none": (post(b"Content-Length: x\r\n"), 400),
    "a length below 0": (post(b"Content-Length: -1\r\n"), 400),
    "a length of 5,000 digits": (post(b"Content-Length: " + b"9" * 5000 + b"\r\n"), 400),
    "a length of 19 digits": (post(b"Content-Length: " + b"9" * 19 + b"\r\n"), 413),
    "two lengths": (post(LENGTH, b"Content-Length: 3\r\n"), 400),
    "the same length twice": (post(LENGTH, LENGTH), 200),
    "a length too small": (post(b"Content-Length: 9\r\n"), 400),
    "no length": (post(), 422),
    "a length and chunks": (post(LENGTH, CHUNKED, body=ALL), 200),
    # chunks
    "chunks": (post(CHUNKED, body=ALL), 200),
    "chunks of one byte": (
        post(CHUNKED, body=b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"),
        200,
    ),
    "a chunk's size that is none": (post(CHUNKED, body=b"zz\r\n{}\r\n0\r\n\r\n"), 400),
    "a chunk's size below 0": (post(CHUNKED, body=b"-2\r\n{}\r\n0\r\n\r\n"), 400),
    "a chunk's size of 100 digits": (post(CHUNKED, body=b"f" * 100 + b"\r\n{}\r\n0\r\n\r\n"), 400),
    "a chunk longer than its size": (post(CHUNKED, body=b"1\r\n{}\r\n0\r\n\r\n"), 400),
    "a chunk with an extension": (post(CHUNKED, body=b"2;a=b\r\n{}\r\n0\r\n\r\n"), 422),
    "a trailer": (post(CHUNKED, body=ALL[:-2] + b"X-Request-ID: late\r\n\r\n"), 200),
    "another coding": (post(b"Transfer-Encoding: gzip, chunked\r\n", body=ALL), 400),
    # bodies
    "gzip": (post(b"Content-Encoding: gzip\r\n", LENGTH, body=b"\x1f\x8b" + BODY[2:]), 400),
    "no type": (b"POST /score HTTP/1.1\r\nHost: x\r\n" + CLOSE + LENGTH + b"\r\n" + BODY, 422),
    "text": (typed(b"text/plain"), 422),
    "a form": (typed(b"application/x-www-form-urlencoded"), 422),
    "several parts": (typed(b"multipart/form-data; boundary=x"), 422),
    "a type that is none": (typed(b"\xff;;=;"), 422),
    "JSON of another kind": (typed(b"application/geo+json"), 200),
    "a charset": (typed(b"application/json; charset=utf-8"), 200),
    "a charset that is none": (typed(b"application/json; charset=none"), 200),
    "another charset": (typed(b"application/json; charset=utf-16", BODY.decode().encode("utf-16")), 200),
    "a mark of the byte order": (typed(b"application/json", b"\xef\xbb\xbf" + BODY), 200),
    "two types": (post(LENGTH, b"Content-Type: text/plain\r\n"), 200),
}

# Incomplete requests. The client does not read a response.
HALF = {
    "nothing": b"",
    "HTTP/0.9": b"GET /\r\n",
    "half a line": b"POST /sco",
    "half a header": SCORE[:-9],
    "no body": SCORE + LENGTH + b"\r\n",
    "half a body": SCORE + LENGTH + b"\r\n" + BODY[:20],
    "half a chunk": SCORE + CHUNKED + b"\r\nff\r\n{",
}


@pytest.fixture(scope="module")
def service() -> Iterator[Process]:
    with process(*FAKE) as started:
        started.check_reward()
        yield started


@pytest.fixture(scope="module")
def before(service: Process) -> Resources:
    return service.resources()


@pytest.fixture(autouse=True)
def no_leaks(service: Process, before: Resources) -> Iterator[None]:
    yield
    service.check_reward()
    # The event loop handles the end of a connection later; requests make it run.
    after = next(
        (found for found in (service.resources() for _ in range(100)) if found <= before), service.resources()
    )
    assert after <= before


def connect(service: Process) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S)


def read(connection: socket.socket) -> bytes:
    """All bytes until the service closes the connection."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass  # closed before it read everything
    return received


def statuses(answered: bytes) -> list[int]:
    return [int(part[:3]) for part in answered.split(b"HTTP/1.1 ")[1:]] or [NOTHING]


@pytest.mark.parametrize(("sent", "status"), WHOLE.values(), ids=WHOLE)
def test_an_unusual_request_gets_a_response(service: Process, sent: bytes, status: int) -> None:
    with connect(service) as connection:
        connection.sendall(sent)
        answered = read(connection)
    assert statuses(answered)[0] == status, answered


@pytest.mark.parametrize("headers", [[b"X: " + b"a" * 300_000], [b"X: aaaaaa"] * 30_000], ids=["one", "many"])
def test_endless_headers_are_rejected(service: Process, headers: list[bytes]) -> None:
    with connect(service) as connection:
        connection.sendall(get(b"GET /info HTTP/1.1", *headers))
        answered = read(connection)
    # The service closes before it has read everything. The response may get lost in the kernel.
    assert statuses(answered)[0] in (400, NOTHING), answered


def test_a_header_of_100_kilobytes(service: Process) -> None:
    with connect(service) as connection:
        connection.sendall(get(b"GET /info HTTP/1.1", b"X: " + b"a" * 100_000))
        # Accepted if it is read at once: the limit of 64 kB is on incomplete heads.
        assert statuses(read(connection))[0] in (200, 400, NOTHING)


def close(connection: socket.socket) -> None:
    connection.close()


def shut_down(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)
    assert set(statuses(read(connection))) <= {NOTHING, 400}
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("end", [close, shut_down, reset])
@pytest.mark.parametrize("sent", HALF.values(), ids=HALF)
def test_an_incomplete_request_ends(
    service: Process, sent: bytes, end: Callable[[socket.socket], None]
) -> None:
    connection = connect(service)
    connection.sendall(sent)
    end(connection)


def test_a_half_closed_connection_gets_a_complete_response_or_none(service: Process) -> None:
    """uvicorn treats a half-closed connection as disconnected."""
    with connect(service) as connection:
        connection.sendall(SCORE + LENGTH + b"\r\n" + BODY)
        connection.shutdown(socket.SHUT_WR)
        answered = read(connection)
    assert answered == b"" or (statuses(answered) == [200] and b'"reward":0.93' in answered)


def test_pipelined_requests_are_answered_in_order(service: Process) -> None:
    with connect(service) as connection:
        one = SCORE + LENGTH + b"\r\n" + BODY
        connection.sendall(
            one + b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n" + one + get(b"GET /info HTTP/1.1")
        )
        answered = read(connection)
    assert statuses(answered) == [200, 404, 200, 200]


@pytest.mark.parametrize("end", [close, reset])
def test_a_client_that_disconnects_during_scoring(
    service: Process, end: Callable[[socket.socket], None]
) -> None:
    body = json.dumps(request(HELD)).encode()
    connection = connect(service)
    connection.sendall(SCORE + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    service.wait_until_scoring()
    end(connection)
    service.release()


def test_many_silent_connections(service: Process) -> None:
    idle = [connect(service) for _ in range(200)]
    service.check_reward()
    for connection in idle:
        reset(connection)
