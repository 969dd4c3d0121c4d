"""OpenAPI responses of the errors that a route may return."""

from collections.abc import Sequence
from typing import Any

from shopr1_client.errors import (
    PROBLEM_MEDIA_TYPE,
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
"""Answers that may say when to try again; 409 only if the version may still come."""

SCHEMA_REF = "#/components/schemas/{model}"


def problem_responses(*problems: type[ProblemError]) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for errors, with an example each."""
    statuses = dict.fromkeys(problem.status for problem in problems)
    return {status: _problem_response([p for p in problems if p.status == status]) for status in statuses}


def _problem_response(problems: Sequence[type[ProblemError]]) -> dict[str, Any]:
    """The response for problems that have their status in common."""
    bodies = {p.code: p("What happened, for people.", request_id="4f3c").to_problem() for p in problems}
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


_CHANGES: tuple[type[ProblemError], ...] = (
    MalformedBodyError,
    RequestTimeoutError,
    UpdateConflictError,
    TooLargeError,
    InvalidRequestError,
    InvalidWeightsError,
    InternalError,
    NotReadyError,
    StorageError,
)
CHANGE_PROBLEMS = problem_responses(*_CHANGES)
