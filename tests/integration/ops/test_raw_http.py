"""What no HTTP library would send, byte by byte: it is refused or dropped, and nothing stays behind."""

import json
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.integration.ops.fake_server import HELD
from tests.integration.ops.process import FAKE, Held, Process, process, request
from tests.support.http import WAIT_S

BODY = json.dumps(request()).encode()
SCORE = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CLOSE = b"Connection: close\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
ALL = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)

NOTHING = -1
"""The connection is closed without an answer."""


def get(line: bytes, *headers: bytes) -> bytes:
    return b"".join([line, b"\r\nHost: x\r\n", *(header + b"\r\n" for header in headers), CLOSE, b"\r\n"])


def post(*headers: bytes, body: bytes = BODY) -> bytes:
    return b"".join([SCORE, CLOSE, *headers, b"\r\n", body])


def typed(content_type: bytes, body: bytes = BODY) -> bytes:
    line = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n"
    return line % (content_type, len(body)) + CLOSE + b"\r\n" + body


# What is sent, and the status that must be answered.
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

# What ends before it is whole. Nobody is there to read an answer.
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
        started.check_right()
        yield started


@pytest.fixture(scope="module")
def before(service: Process) -> Held:
    return service.held()


@pytest.fixture(autouse=True)
def nothing_stays(service: Process, before: Held) -> Iterator[None]:
    yield
    service.check_right()
    # The end of a connection is seen when the loop comes round to it: requests make it do so.
    after = next((held for held in (service.held() for _ in range(100)) if held <= before), service.held())
    assert after <= before


def connect(service: Process) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S)


def read(connection: socket.socket) -> bytes:
    """All that comes until the service closes the connection."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass  # it has closed while more was on its way to it
    return received


def statuses(answered: bytes) -> list[int]:
    return [int(part[:3]) for part in answered.split(b"HTTP/1.1 ")[1:]] or [NOTHING]


@pytest.mark.parametrize(("sent", "status"), WHOLE.values(), ids=WHOLE)
def test_a_strange_request_is_answered(service: Process, sent: bytes, status: int) -> None:
    with connect(service) as connection:
        connection.sendall(sent)
        answered = read(connection)
    assert statuses(answered)[0] == status, answered


@pytest.mark.parametrize("headers", [[b"X: " + b"a" * 300_000], [b"X: aaaaaa"] * 30_000], ids=["one", "many"])
def test_headers_without_end_are_refused(service: Process, headers: list[bytes]) -> None:
    with connect(service) as connection:
        connection.sendall(get(b"GET /info HTTP/1.1", *headers))
        answered = read(connection)
    # It closes before it has read all; what the kernel then does with the answer is a matter of time.
    assert statuses(answered)[0] in (400, NOTHING), answered


def test_a_header_of_100_kilobytes(service: Process) -> None:
    with connect(service) as connection:
        connection.sendall(get(b"GET /info HTTP/1.1", b"X: " + b"a" * 100_000))
        # Read in one piece it is taken: the limit of 64 kB is on what is not whole yet.
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
def test_half_a_request_ends(service: Process, sent: bytes, end: Callable[[socket.socket], None]) -> None:
    connection = connect(service)
    connection.sendall(sent)
    end(connection)


def test_whoever_will_say_no_more_gets_all_or_nothing(service: Process) -> None:
    """uvicorn takes a client that has shut down its half of the connection for one that has gone."""
    with connect(service) as connection:
        connection.sendall(SCORE + LENGTH + b"\r\n" + BODY)
        connection.shutdown(socket.SHUT_WR)
        answered = read(connection)
    assert answered == b"" or (statuses(answered) == [200] and b'"reward":0.93' in answered)


def test_requests_in_one_go_are_answered_in_order(service: Process) -> None:
    with connect(service) as connection:
        one = SCORE + LENGTH + b"\r\n" + BODY
        connection.sendall(
            one + b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n" + one + get(b"GET /info HTTP/1.1")
        )
        answered = read(connection)
    assert statuses(answered) == [200, 404, 200, 200]


@pytest.mark.parametrize("end", [close, reset])
def test_a_client_that_goes_while_it_is_scored(
    service: Process, end: Callable[[socket.socket], None]
) -> None:
    body = json.dumps(request(HELD)).encode()
    connection = connect(service)
    connection.sendall(SCORE + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    service.wait_until_scoring()
    end(connection)
    service.go_on()


def test_many_connections_that_say_nothing(service: Process) -> None:
    idle = [connect(service) for _ in range(200)]
    service.check_right()
    for connection in idle:
        reset(connection)
