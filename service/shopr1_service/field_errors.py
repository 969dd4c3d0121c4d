"""From what is wrong with a request, field by field, to the problem that says so."""

from collections.abc import Sequence

from shopr1_client.errors import FieldError, InvalidRequestError, ProblemError

_MAX_SHOWN = 3


def refuse_if_any(errors: Sequence[FieldError], problem: type[ProblemError] = InvalidRequestError) -> None:
    """Raise a problem that names these fields, if there are any."""
    if errors:
        raise problem(_summary(errors), errors=errors)


def flaw(problem: type[ProblemError], location: str | None, message: str) -> ProblemError:
    """The problem for a single flaw; `location` is None where no field is at fault."""
    errors: list[FieldError] = [] if location is None else [{"location": location, "message": message}]
    return problem(message, errors=errors)


def _summary(errors: Sequence[FieldError]) -> str:
    shown = "; ".join(f"{error['location']}: {error['message']}" for error in errors[:_MAX_SHOWN])
    more = f"; and {len(errors) - _MAX_SHOWN} more" if len(errors) > _MAX_SHOWN else ""
    return shown + more
