"""Every error as `application/problem+json` (RFC 9457): one handler, one table (`shopr1_client.errors`)."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import orjson
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
    ProblemError,
    RequestTimeoutError,
    TooLargeError,
)
from shopr1_client.wire_base import is_union_tag
from shopr1_service.field_errors import refuse_if_any
from shopr1_service.http.deadline import ClientDisconnectedError
from shopr1_service.http.request_context import REQUEST_ID_HEADER, request_id_of

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for requests whose client has gone. It stands in metrics only: nobody reads the answer."""

_BY_STATUS: dict[int, type[ProblemError]] = {
    problem.status: problem
    for problem in (
        MalformedBodyError,
        NotFoundError,
        MethodNotAllowedError,
        RequestTimeoutError,
        TooLargeError,
    )
}
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
_DECODING: dict[type, str] = {
    UnicodeDecodeError: "the body is not UTF-8",
    RecursionError: "the body is nested too deeply",
}


def install_handlers(app: FastAPI) -> None:
    """Answer every exception of the application with a problem."""
    app.add_exception_handler(ProblemError, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnectedError, _on_client_gone)
    app.add_exception_handler(Exception, _on_bug)


def problem_response(
    problem: ProblemError, request_id: str, headers: dict[str, str] | None = None
) -> Response:
    """The answer for a problem."""
    # Answers to bugs do not pass the middleware that adds the id to all others.
    headers = {**(headers or {}), REQUEST_ID_HEADER: request_id}
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(problem.retry_after_s))
    return Response(
        orjson.dumps(problem.to_problem(request_id)),
        status_code=problem.status,
        media_type=PROBLEM_MEDIA_TYPE,
        headers=headers,
    )


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)  # starlette dispatches by class
    return problem_response(error, request_id_of(request.scope))


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem_response(_invalid(error.errors()), request_id_of(request.scope))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem_class = _BY_STATUS.get(error.status_code, InternalError)
    # FastAPI hides why a body could not be decoded behind a general sentence.
    detail = _DECODING.get(type(error.__cause__), str(error.detail))
    headers = dict(error.headers or {})
    if problem_class is MethodNotAllowedError:
        headers["Allow"] = ", ".join(_allowed(request))
    return problem_response(problem_class(detail), request_id_of(request.scope), headers)


def _allowed(request: Request) -> list[str]:
    """The methods of a path. Starlette names those of one route only, and a path may have several."""
    scopes = {method: {**request.scope, "method": method} for method in _METHODS}
    return [
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    ]


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_bug(request: Request, error: Exception) -> Response:
    request_id = request_id_of(request.scope)
    logger.error("%s %s failed, request %s", request.method, request.url.path, request_id, exc_info=error)
    detail = "The service failed on this request. Its log has the details under the request id."
    return problem_response(InternalError(detail), request_id)


def _invalid(details: Sequence[Any]) -> ProblemError:
    if details and details[0]["type"] == "json_invalid":
        what = details[0]["ctx"]["error"].removesuffix(" at")  # as some of the decoder's messages end
        return MalformedBodyError(f"{what} at character {details[0]['loc'][-1]}")
    errors: list[FieldError] = [{"location": _path(d["loc"]), "message": d["msg"]} for d in details]
    try:
        refuse_if_any(errors)
    except InvalidRequestError as problem:
        return problem
    return InvalidRequestError("the request is not valid")


def _path(location: Sequence[str | int]) -> str:
    """`groups[1].completions[0].text` from pydantic's location, without its union tags."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not is_union_tag(part):
            path += f".{part}"
    return path.removeprefix(".").removeprefix("body").removeprefix(".") or "body"
