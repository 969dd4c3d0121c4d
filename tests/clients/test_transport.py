"""The HTTP layer of both clients: parsing of responses, errors, and the choice of errors to retry."""

from collections.abc import Callable
from typing import Any

import pytest

from shopr1_client import Client, ProblemError, ShopR1Error, TransportError
from shopr1_client.errors import (
    PROBLEMS,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    MalformedBodyError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    PolicyVersionError,
)
from shopr1_client.transport import WrongUrlError, backoff
from tests.support.canned_server import answering


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OverloadedError("full", retry_after_s=7.0), 7.0),
        (OverloadedError("full"), True),
        (NotReadyError("loading", retry_after_s=5.0), 5.0),
        (PolicyVersionError("comes soon", retry_after_s=2.0), False),
        (PolicyVersionError("another"), False),
        (InvalidRequestError("bad"), False),
        (InternalError("bug"), False),
        (DeadlineExceededError("too slow"), False),
        (TransportError("reset"), True),
        (WrongUrlError("not a service"), False),
        (ValueError("a bug of the client"), False),
    ],
)
def test_retried_errors(error: Exception, expected: bool | float) -> None:
    assert backoff(error) == expected
    assert type(backoff(error)) is type(expected)


@pytest.mark.parametrize(("status", "expected"), [(500, False), (502, True), (503, True), (504, True)])
def test_gateways_are_tried_again(status: int, expected: bool) -> None:
    error = ProblemError("HTTP 50x: <html>")
    error.status = status
    assert backoff(error) is expected


def caught(call: Callable[[Client], Any], status: int, body: bytes, **headers: str) -> ProblemError:
    server = answering(status, body, headers)
    with server as url, Client(url, retry_for_s=0) as client, pytest.raises(ProblemError) as error:
        call(client)
    return error.value


@pytest.mark.parametrize("problem_class", PROBLEMS, ids=lambda problem: problem.code)
def test_every_code_becomes_its_class(problem_class: type[ProblemError]) -> None:
    # The code decides, whatever the status.
    body = f'{{"code": "{problem_class.code}", "detail": "because", "request_id": "7", "errors": []}}'
    for status in (problem_class.status, 418):
        error = caught(Client.info, status, body.encode())
        assert type(error) is problem_class
        assert (error.detail, error.request_id, error.errors) == ("because", "7", [])


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"<html>Bad gateway</html>", "HTTP 502: <html>Bad gateway</html>"),
        (b"", "HTTP 502: "),
        (b"[1]", "HTTP 502: [1]"),
        (b'"text"', 'HTTP 502: "text"'),
        (b"null", "HTTP 502: null"),
        (b"\xff\xfe", "HTTP 502: "),
        (b"x" * 5000, "HTTP 502: " + "x" * 200),
        (b"[" * 100_000, "HTTP 502: " + "[" * 200),
    ],
)
def test_answers_that_are_no_problem(body: bytes, detail: str) -> None:
    error = caught(Client.info, 502, body)
    assert type(error) is ProblemError
    assert error.detail.startswith(detail)
    assert len(error.detail) <= 210


@pytest.mark.parametrize("status", [300, 302, 401, 429, 502, 504])
def test_other_statuses_are_plain_problems(status: int) -> None:
    error = caught(Client.info, status, b'{"detail": "by a proxy"}')
    assert type(error) is ProblemError
    assert error.detail == "by a proxy"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        ("5", 5.0),
        ("120", 120.0),
        ("", None),
        ("-1", None),
        ("soon", None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
        ("\xb2", None),  # a superscript two, which Python takes for a digit
    ],
)
def test_retry_after(header: str, seconds: float | None) -> None:
    headers = {"Retry-After": header}
    assert caught(Client.info, 503, b'{"code": "not_ready"}', **headers).retry_after_s == seconds
    assert caught(Client.info, 503, b"no JSON", **headers).retry_after_s == seconds


@pytest.mark.parametrize(
    ("status", "expected"), [(400, MalformedBodyError), (404, NotFoundError), (500, InternalError)]
)
def test_problems_with_a_body_of_ours(status: int, expected: type[ProblemError]) -> None:
    body = expected("because", request_id="7").to_problem()
    assert body["status"] == status
    assert type(caught(Client.info, status, str(body).replace("'", '"').encode())) is expected


@pytest.mark.parametrize("body", [b"<html>Welcome</html>", b"{}", b"[]", b'{"version": 1}', b""])
def test_a_right_answer_that_is_none_of_this_service(body: bytes) -> None:
    """As when the URL is another service's: the client's errors are all that a caller must know."""
    with answering(200, body) as url, Client(url) as client, pytest.raises(ShopR1Error):
        client.info()
