"""Problems that name the bad fields of a request."""

import pytest

from shopr1_client.errors import FieldError, InvalidRequestError, NotFoundError
from shopr1_service.field_errors import field_problem, field_problems, raise_if_any

ERRORS: list[FieldError] = [{"location": f"groups[{i}]", "message": f"bad {i}"} for i in range(5)]


def test_a_problem_has_all_errors() -> None:
    raise_if_any([])
    with pytest.raises(InvalidRequestError, match="and 2 more") as caught:
        raise_if_any(ERRORS)
    assert caught.value.errors == ERRORS
    with pytest.raises(NotFoundError):
        raise_if_any(ERRORS, NotFoundError)


def test_a_problem_of_one_field() -> None:
    problem = field_problem(NotFoundError, "name", "not loaded")
    assert (type(problem), problem.detail) == (NotFoundError, "not loaded")
    assert problem.errors == [{"location": "name", "message": "not loaded"}]
    assert field_problem(NotFoundError, None, "not loaded").errors == []


def test_a_problem_of_several_fields() -> None:
    problem = field_problems(["a", "b[1]"], "occurs twice")
    assert problem.errors == [{"location": name, "message": "occurs twice"} for name in ("a", "b[1]")]
    assert problem.detail == "a: occurs twice; b[1]: occurs twice"
