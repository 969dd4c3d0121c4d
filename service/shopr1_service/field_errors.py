"""Problems that name the bad fields of a request."""

from collections.abc import Sequence

from shopr1_client.errors import FieldError, InvalidRequestError, ProblemError, summary


def raise_if_any(errors: Sequence[FieldError], problem: type[ProblemError] = InvalidRequestError) -> None:
    """Raise a problem that names these fields, if there are any."""
    if errors:
        raise problem(summary(errors), errors=errors)


def field_problem(problem: type[ProblemError], location: str | None, message: str) -> ProblemError:
    """The problem for one bad field; `location` is None where no field is at fault."""
    errors: list[FieldError] = [] if location is None else [{"location": location, "message": message}]
    return problem(message, errors=errors)


def field_problems(locations: Sequence[str], message: str) -> InvalidRequestError:
    """The problem for several fields with the same flaw."""
    errors: list[FieldError] = [{"location": location, "message": message} for location in locations]
    return InvalidRequestError(summary(errors), errors=errors)
