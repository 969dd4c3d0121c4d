"""OpenAPI responses for the problems that a route may return."""

from collections.abc import Sequence
from typing import Any

from shopr1_client.errors import (
    PROBLEM_MEDIA_TYPE,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    InvalidWeightsError,
    MalformedBodyError,
    NotReadyError,
    OverloadedError,
    PolicyVersionError,
    ProblemError,
    RequestTimeoutError,
    StorageError,
    TooLargeError,
    UpdateConflictError,
)

_RETRIED = {problem.status for problem in (PolicyVersionError, OverloadedError, NotReadyError)}
"""Statuses that may have `Retry-After`; 409 only if the version may still be loaded."""

SCHEMA_REF = "#/components/schemas/{model}"


def problem_responses(*problems: type[ProblemError]) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for problems, by status, with an example each."""
    statuses = sorted({problem.status for problem in problems})
    return {status: _problem_response([p for p in problems if p.status == status]) for status in statuses}


def _problem_response(problems: Sequence[type[ProblemError]]) -> dict[str, Any]:
    """The response for problems of the same status."""
    bodies = {p.code: p("An explanation for humans.", request_id="4f3c").to_problem() for p in problems}
    content: dict[str, Any] = {"schema": {"$ref": SCHEMA_REF.format(model="Problem")}}
    if len(bodies) == 1:
        [content["example"]] = bodies.values()
    else:
        content["examples"] = {code: {"value": body} for code, body in bodies.items()}
    response: dict[str, Any] = {
        "description": ", or: ".join(problem.title for problem in problems),
        "content": {PROBLEM_MEDIA_TYPE: content},
    }
    if problems[0].status in _RETRIED:
        seconds = {"description": "Seconds to wait.", "schema": {"type": "integer"}}
        response["headers"] = {"Retry-After": seconds}
    return response


BODY = (
    *(MalformedBodyError, RequestTimeoutError, TooLargeError, InvalidRequestError, OverloadedError),
    InternalError,
)
"""Problems of every route that takes a body."""
SCORING = (*BODY, NotReadyError, DeadlineExceededError)
"""Problems of every route that scores."""
CHANGE_PROBLEMS = problem_responses(
    *BODY, UpdateConflictError, InvalidWeightsError, NotReadyError, StorageError
)
