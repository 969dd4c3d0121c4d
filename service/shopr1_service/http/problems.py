"""Map every error to an `application/problem+json` response (RFC 9457).

The classes, with their statuses and codes, are in `shopr1_client.errors`. Raised by:

    400, 422                 FastAPI and pydantic; `scoring/prepare.py` for what needs the recipe or tokenizer
    401, 403                 `middleware/auth.py`
    404, 405                 Starlette's router; the routes for unknown recipes and adapters
    408                      `middleware/body_limits.py`
    413                      `middleware/body_limits.py`; `scoring/` and `updates/` for their own limits;
                             `memory/budget.py` for what never fits into it
    409                      `policy/versions.py`, `updates/`
    429                      `scheduling/scheduler.py` when the request queue is full; on Ray
                             `cluster/remote_engines.py` when every engine's is; `memory/budget.py` for what
                             does not fit into it now
    503                      `state.py` while loading or ending, `scheduling/` when the engine has failed,
                             `middleware/availability.py` at the end and where file descriptors run short
    504                      `deadline.py`
    507                      `weights/`, `updates/`: no space for new weights, or a failing disk
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import orjson
from asgi_correlation_id import correlation_id
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from shopr1_client.errors import (
    PROBLEM_MEDIA_TYPE,
    FieldError,
    InternalError,
    InvalidRequestError,
    MalformedBodyError,
    MethodNotAllowedError,
    NotFoundError,
    OverloadedError,
    ProblemError,
    RequestTimeoutError,
    TooLargeError,
    summary,
)
from shopr1_client.field_messages import field_path, plain_message
from shopr1_service.http.deadline import ClientDisconnectedError

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-ID"
RETRY_AFTER_HEADER = "Retry-After"
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that has disconnected. It appears in metrics only: nobody reads the
response."""

_BY_STATUS: dict[int, type[ProblemError]] = {
    problem.status: problem
    for problem in (
        MalformedBodyError,
        NotFoundError,
        MethodNotAllowedError,
        RequestTimeoutError,
        TooLargeError,
        OverloadedError,
    )
}
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
_DECODING_ERRORS: dict[type, str] = {
    UnicodeDecodeError: "the body is not UTF-8",
    RecursionError: "the body is nested too deeply",
}


ExtendProblem = Callable[[ProblemError], dict[str, Any]]
_EXTENSION = "extend_problem"
_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


def extending_problems(extend: ExtendProblem) -> Callable[[_Endpoint], _Endpoint]:
    """Decorator of an endpoint whose problems have further members (RFC 9457, 3.2)."""

    def decorate(endpoint: _Endpoint) -> _Endpoint:
        setattr(endpoint, _EXTENSION, extend)
        return endpoint

    return decorate


def install_handlers(app: FastAPI) -> None:
    """Answer every exception of the application with a problem."""
    app.add_exception_handler(ProblemError, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnectedError, _on_client_disconnected)
    app.add_exception_handler(Exception, _on_bug)


def problem_response(
    problem: ProblemError, headers: dict[str, str] | None = None, endpoint: object = None
) -> Response:
    """The response for a problem.

    Args:
        endpoint: the one that failed; see `extending_problems`.
    """
    extend: ExtendProblem = getattr(endpoint, _EXTENSION, lambda _: {})
    headers = headers or {}
    if problem.retry_after_s is not None:
        headers[RETRY_AFTER_HEADER] = str(math.ceil(problem.retry_after_s))
    return Response(
        orjson.dumps(problem.to_problem(correlation_id.get()) | extend(problem)),
        status_code=problem.status,
        media_type=PROBLEM_MEDIA_TYPE,
        headers=headers,
    )


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)  # starlette dispatches by class
    return problem_response(error, endpoint=request.scope.get("endpoint"))


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem_response(_invalid(error.errors()), endpoint=request.scope.get("endpoint"))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, RequestValidationError):  # raised while the body was read
        return await _on_invalid(request, error.__cause__)
    if isinstance(error.__cause__, ProblemError):
        return await _on_problem(request, error.__cause__)
    problem_class = _BY_STATUS.get(error.status_code, InternalError)
    # FastAPI hides why a body could not be decoded behind a general sentence.
    detail = _DECODING_ERRORS.get(type(error.__cause__), str(error.detail))
    headers = dict(error.headers or {})
    if problem_class is MethodNotAllowedError:
        headers["Allow"] = ", ".join(_allowed_methods(request))
    return problem_response(problem_class(detail), headers)


def _allowed_methods(request: Request) -> list[str]:
    """The methods of a path. Starlette names those of one route only, and a path may have several."""
    scopes = {method: {**request.scope, "method": method} for method in _METHODS}
    return [
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    ]


async def _on_client_disconnected(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_bug(request: Request, error: Exception) -> Response:
    request_id = correlation_id.get() or ""
    logger.error("%s %s failed, request %s", request.method, request.url.path, request_id, exc_info=error)
    detail = "The service failed on this request. Its log has the details under the request id."
    # This response does not pass the middleware that adds the id to all others.
    return problem_response(InternalError(detail), {REQUEST_ID_HEADER: request_id})


def _invalid(details: Sequence[Any]) -> ProblemError:
    if details and details[0]["type"] == "json_invalid":
        reason = details[0]["ctx"]["error"].removesuffix(" at")  # some of the decoder's messages end so
        return MalformedBodyError(f"{reason} at character {details[0]['loc'][-1]}")
    errors: list[FieldError] = [{"location": _path(d["loc"]), "message": plain_message(d)} for d in details]
    return InvalidRequestError(summary(errors) or "the request is not valid", errors=errors)


def _path(location: Sequence[str | int]) -> str:
    return field_path(location).removeprefix("body").removeprefix(".") or "body"
