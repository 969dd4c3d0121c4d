"""OpenAPI responses for problems: one per status, with an example of each problem."""

from shopr1_client.errors import (
    InvalidRequestError,
    InvalidWeightsError,
    NotReadyError,
    PolicyVersionError,
    ProblemError,
    UpdateConflictError,
)
from shopr1_service.http.problem_responses import problem_responses

MEDIA_TYPE = "application/problem+json"


def example(problem: type[ProblemError]) -> object:
    return problem("An explanation for humans.", request_id="4f3c").to_problem()


def test_statuses_are_distinct_and_ascending() -> None:
    assert problem_responses() == {}
    responses = problem_responses(NotReadyError, InvalidWeightsError, PolicyVersionError, InvalidRequestError)
    assert list(responses) == [409, 422, 503]


def test_one_problem_is_the_example() -> None:
    response = problem_responses(InvalidRequestError)[422]
    assert response == {
        "description": InvalidRequestError.title,
        "content": {
            MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "example": example(InvalidRequestError),
            }
        },
    }


def test_problems_of_one_status_are_examples_by_code() -> None:
    response = problem_responses(PolicyVersionError, UpdateConflictError)[409]
    assert response["description"] == f"{PolicyVersionError.title}, or: {UpdateConflictError.title}"
    assert response["content"][MEDIA_TYPE]["examples"] == {
        "policy_version": {"value": example(PolicyVersionError)},
        "update_conflict": {"value": example(UpdateConflictError)},
    }


def test_retried_problems_have_retry_after() -> None:
    responses = problem_responses(InvalidRequestError, NotReadyError)
    assert "headers" not in responses[422]
    assert responses[503]["headers"]["Retry-After"]["schema"] == {"type": "integer"}
