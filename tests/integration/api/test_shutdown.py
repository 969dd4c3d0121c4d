"""SIGTERM while a body arrives or an answer is not read: a problem in time, nothing lost, nothing held."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPResponse

import httpx
import pytest

from shopr1_client.errors import NotReadyError, from_problem
from shopr1_service.policy.fake import FakePolicy
from tests.support.http import WAIT_S, answer, group
from tests.support.models import policy_of, tiny_model
from tests.support.signalled import Service
from tests.support.updating import adapter_file, changed_model, file_of

SCORE = json.dumps({"groups": [group(answer())]}).encode()
WEIGHTS = file_of(changed_model())
CUT = [
    pytest.param("PUT /policy/weights?version=1", WEIGHTS, 0.5, id="weights"),
    pytest.param("PUT /policy/weights?version=1", WEIGHTS, 0.0, id="weights, no byte yet"),
    pytest.param("PUT /policy/adapters/a", adapter_file(), 0.5, id="an adapter"),
    pytest.param("POST /score", SCORE, 0.5, id="rollouts"),
    pytest.param("POST /policy/update", SCORE, 0.5, id="an update"),
]


@contextlib.contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as client:
        yield client


def problem_of(response: HTTPResponse) -> NotReadyError:
    """The response's problem, which must be that the service ends."""
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["X-Request-ID"]
    retry_after_s = float(response.headers["Retry-After"])
    error = from_problem(json.loads(response.read()), response.status, retry_after_s)
    assert isinstance(error, NotReadyError)
    assert error.status == 503
    return error


@pytest.mark.parametrize(("line", "content", "part"), CUT)
def test_a_body_that_has_not_arrived_at_the_end_is_answered_503(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, line: str, content: bytes, part: float
) -> None:
    service = Service(monkeypatch, policy_of(tiny_model()), shutdown_grace_s=4)
    head = f"{line} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"

    def ask() -> NotReadyError:
        with connected(service.url) as client:
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
            client.sendall(content[: int(len(content) * part)])
            until_begun(service.url, line)
            service.stop()
            with contextlib.closing(HTTPResponse(client)) as response:
                response.begin()
                return problem_of(response)

    error = service.serve_during(ask)
    assert error.detail == "the service is shutting down"
    assert error.retry_after_s is not None
    assert "Traceback" not in caplog.text


def until_begun(url: str, line: str) -> None:
    """Return when the service knows of the update, if it is one that it shows."""
    while line.startswith("PUT /policy/weights") and httpx.get(f"{url}/policy").json()["update"] is None:
        threading.Event().wait(0.01)


def test_a_client_that_is_sending_reads_the_problem(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its body does not end before it is refused."""
    # A second lies between the answer and the end of the grace time, in which it has to arrive.
    service = Service(monkeypatch, policy_of(tiny_model()), shutdown_grace_s=8)
    has_begun = threading.Event()

    def slowly() -> Iterator[bytes]:
        half = len(WEIGHTS) // 2
        yield WEIGHTS[:half]
        has_begun.set()
        for start in range(half, len(WEIGHTS)):
            yield WEIGHTS[start : start + 1]
            threading.Event().wait(0.01)

    def stop() -> None:
        assert has_begun.wait(WAIT_S)
        service.stop()

    def ask() -> httpx.Response:
        stopping = threading.Thread(target=stop)
        stopping.start()
        url = f"{service.url}/policy/weights?version=1"
        headers = {"Content-Length": str(len(WEIGHTS))}
        try:
            return httpx.put(url, content=slowly(), headers=headers, timeout=WAIT_S)
        finally:
            stopping.join()

    assert service.serve_during(ask).status_code == 503
    assert "Traceback" not in caplog.text


def test_a_stalled_reader_does_not_hold_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a limit of its own, the end would wait for `shutdown_grace_s`."""
    service = Service(monkeypatch, FakePolicy(), shutdown_grace_s=10_000)

    with contextlib.ExitStack() as clients:

        def ask() -> None:
            client = clients.enter_context(connected(service.url))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for _ in range(1000):  # their answers are larger than all buffers
                    client.send(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
            until_stalled(service.url)
            service.stop()

        service.serve_during(ask)
    assert "Traceback" not in caplog.text


def until_stalled(url: str) -> None:
    """Return when no further answer can be sent."""
    before = 0
    while before == 0 or before < num_answers(url):
        before = num_answers(url)
        threading.Event().wait(0.3)


def num_answers(url: str) -> int:
    """Answers that have been sent to requests for the OpenAPI document."""
    labels = 'method="GET",route="unknown",status="200"'
    rows = [row for row in httpx.get(f"{url}/metrics").text.splitlines() if labels in row]
    return sum(int(float(row.split()[-1])) for row in rows if row.startswith("shopr1_requests_total{"))
