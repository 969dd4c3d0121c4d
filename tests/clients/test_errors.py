"""Every problem on its way over the wire: from a class, to a body, to the same class again."""

import copy
import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from shopr1_client.errors import (
    PROBLEMS,
    FieldError,
    InvalidRequestError,
    MixedVersionsError,
    NotReadyError,
    ProblemError,
    SettingsError,
    ShopR1Error,
    TransportError,
    UnsendableModelError,
    VerificationError,
    from_problem,
    summary,
)
from shopr1_client.wire import Problem

BAD_FIELDS: list[FieldError] = [{"location": "groups[1].prompt", "message": "must be a string"}]

CODES = {
    "malformed_body": 400,
    "unauthenticated": 401,
    "forbidden": 403,
    "request_timeout": 408,
    "not_found": 404,
    "method_not_allowed": 405,
    "policy_version": 409,
    "update_conflict": 409,
    "too_large": 413,
    "invalid_request": 422,
    "invalid_weights": 422,
    "unscorable": 422,
    "overloaded": 429,
    "internal": 500,
    "not_ready": 503,
    "deadline_exceeded": 504,
    "storage": 507,
}

each_problem = pytest.mark.parametrize("problem_class", PROBLEMS, ids=lambda problem: problem.code)


def attributes(error: ProblemError) -> tuple[Any, ...]:
    return (
        type(error),
        str(error),
        error.args,
        error.detail,
        error.errors,
        error.retry_after_s,
        error.request_id,
    )


def test_codes_and_statuses() -> None:
    assert {problem.code: problem.status for problem in PROBLEMS} == CODES
    assert len({problem.title for problem in PROBLEMS}) == len(PROBLEMS)


def test_the_tree() -> None:
    assert set(ProblemError.__subclasses__()) == set(PROBLEMS)
    assert set(ShopR1Error.__subclasses__()) == {
        *(ProblemError, SettingsError, TransportError, MixedVersionsError),
        *(UnsendableModelError, VerificationError),
    }
    assert issubclass(ShopR1Error, Exception)


@each_problem
def test_the_body_is_a_problem_of_the_wire(problem_class: type[ProblemError]) -> None:
    error = problem_class("what happened", errors=BAD_FIELDS, retry_after_s=3.0)
    body = error.to_problem("4f3c")
    assert body == {
        "type": f"urn:shopr1:problem:{problem_class.code}",
        "title": problem_class.title,
        "status": problem_class.status,
        "detail": "what happened",
        "code": problem_class.code,
        "request_id": "4f3c",
        "errors": BAD_FIELDS,
    }
    assert Problem.model_validate(body).model_dump() == body


def test_the_request_id_of_the_error_itself() -> None:
    assert ProblemError("x", request_id="own").to_problem()["request_id"] == "own"
    assert ProblemError("x", request_id="own").to_problem("given")["request_id"] == "given"
    assert ProblemError("x").to_problem()["request_id"] is None


@each_problem
def test_there_and_back(problem_class: type[ProblemError]) -> None:
    sent = problem_class("what happened", errors=BAD_FIELDS, retry_after_s=3.0, request_id="4f3c")
    body = json.loads(json.dumps(sent.to_problem()))
    assert attributes(from_problem(body, sent.status, 3.0)) == attributes(sent)


@each_problem
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled(problem_class: type[ProblemError], protocol: int) -> None:
    error = problem_class("what happened", errors=BAD_FIELDS, retry_after_s=3.5, request_id="4f3c")
    error.__notes__ = ["in worker 3"]
    loaded = pickle.loads(pickle.dumps(error, protocol))
    assert attributes(loaded) == attributes(error)
    assert loaded.__notes__ == ["in worker 3"]
    assert (loaded.code, loaded.status) == (problem_class.code, problem_class.status)
    assert attributes(copy.copy(error)) == attributes(copy.deepcopy(error)) == attributes(error)


def test_transport_error_pickled() -> None:
    loaded = pickle.loads(pickle.dumps(TransportError("GET /info: refused")))
    assert type(loaded) is TransportError
    assert str(loaded) == "GET /info: refused"


def fail() -> None:
    raise InvalidRequestError("what happened", errors=BAD_FIELDS, request_id="4f3c")


def test_raised_in_a_worker_process() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        error = pool.submit(fail).exception()
    assert isinstance(error, InvalidRequestError)
    assert error.errors == BAD_FIELDS
    assert error.request_id == "4f3c"


@pytest.mark.parametrize(
    "body",
    [
        {"code": "quota_exceeded", "detail": "no more"},
        {"code": None, "detail": "no more"},
        {"code": ["internal"], "detail": "no more"},
        {"detail": "no more"},
    ],
)
def test_an_unknown_code_is_a_plain_problem(body: dict[str, Any]) -> None:
    error = from_problem(body)
    assert type(error) is ProblemError
    assert error.detail == "no more"
    assert (error.errors, error.retry_after_s, error.request_id) == ([], None, None)


def test_a_body_without_a_detail_is_shown_whole() -> None:
    assert "teapot" in str(from_problem({"error": "teapot"}))


def test_errors_are_copied() -> None:
    fields = list(BAD_FIELDS)
    error = InvalidRequestError("x", errors=fields)
    fields.clear()
    assert error.errors == BAD_FIELDS


def test_not_ready_says_when_to_try_again() -> None:
    assert NotReadyError("loading", retry_after_s=5.0).retry_after_s == 5.0


@pytest.mark.parametrize(
    ("num_errors", "expected"),
    [
        (1, "groups[0]: bad 0"),
        (3, "groups[0]: bad 0; groups[1]: bad 1; groups[2]: bad 2"),
        (4, "groups[0]: bad 0; groups[1]: bad 1; groups[2]: bad 2; and 1 more"),
        (5, "groups[0]: bad 0; groups[1]: bad 1; groups[2]: bad 2; and 2 more"),
    ],
)
def test_the_summary_shows_three_fields(num_errors: int, expected: str) -> None:
    errors: list[FieldError] = [{"location": f"groups[{i}]", "message": f"bad {i}"} for i in range(5)]
    assert summary(errors[:num_errors]) == expected


def test_fields_are_renamed_in_the_description_too() -> None:
    error = InvalidRequestError(summary(BAD_FIELDS), errors=BAD_FIELDS, request_id="7")
    error.relocate(lambda text: text.replace("groups[1]", "groups[9]"))
    assert str(error) == error.detail == "groups[9].prompt: must be a string"
    assert error.errors == [{"location": "groups[9].prompt", "message": "must be a string"}]
    assert BAD_FIELDS[0]["location"] == "groups[1].prompt"
    assert error.request_id == "7"
