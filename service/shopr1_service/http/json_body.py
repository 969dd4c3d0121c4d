"""Bodies, read strictly, and large ones beside the event loop: a health check must not wait for them.

The library's parser and validator hold the interpreter's lock from their first byte to their last, also on
another thread. So the number of JSON values is bounded before they are parsed, objects are built by a Python
function, which lets other threads run, and long lists are validated in pieces (`wire_base.IN_PIECES`).

A key that an object has twice is refused, and so is a query parameter that is given twice: FastAPI would take
the last one without a word.
"""

from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from shopr1_client.errors import TooLargeError
from shopr1_client.json_text import DuplicateKeyError, TooManyKeysError, read_json
from shopr1_service.concurrency import in_pool
from shopr1_service.field_errors import field_problems
from shopr1_service.http.state import state_of

_Result = TypeVar("_Result")

MAX_INLINE_BYTES = 64 * 2**10
"""Body up to which the work on it takes less than a thread's turn."""
MAX_KEYS = 65_536
"""Most keys of an object: each step of the libraries with one takes all of them at once."""
_NUM_BYTES, _RAW = "shopr1.num_body_bytes", "shopr1.raw_body"


class JsonRoute(APIRoute):
    """A route whose endpoint gets its JSON body validated, as FastAPI does it, but beside the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        field = self.body_field

        async def handle(request: Request) -> Response:
            _refuse_repeated_parameters(request)
            return await handler(_JsonRequest(request, field))

        return handle


class _JsonRequest(Request):
    """A request whose `json` is the validated body.

    Args:
        field: FastAPI's model of the body; None if the endpoint takes none.
    """

    def __init__(self, request: Request, field: Any) -> None:  # noqa: ANN401  # FastAPI's type is private
        super().__init__(request.scope, request.receive)
        self._field = field

    async def json(self) -> Any:  # noqa: ANN401  # as starlette's
        body = await self.body()
        self.scope[_NUM_BYTES] = len(body)
        max_values = state_of(self).settings.max_body_values
        self.scope[_RAW], read = await beside_loop(self, partial(_read, body, self._field, max_values))
        return read


async def beside_loop(request: Request, work: Callable[[], _Result]) -> _Result:
    """Call `work` on a thread if the request's body is large; it ends at a `checkpoint` when cancelled."""
    if request.scope.get(_NUM_BYTES, 0) <= MAX_INLINE_BYTES:
        return work()
    return await in_pool(None, work)


def raw_body(request: Request) -> Any:  # noqa: ANN401  # whatever JSON can hold
    """The JSON of the body of a `JsonRoute`, before validation."""
    return request.scope[_RAW]


def _read(body: bytes, field: Any, max_values: int) -> tuple[Any, Any]:  # noqa: ANN401  # see above
    """The JSON of a body, and what the endpoint's model makes of it.

    Raises:
        HTTPException: too many values.
        RequestValidationError: they are not the model's. FastAPI makes it the cause of an `HTTPException`.
        InvalidRequestError: an object has a key twice; likewise.
    """
    num_values = body.count(b",") + 1  # with those inside strings
    if num_values > max_values:
        detail = f"the body has up to {num_values} JSON values, by its commas; max_body_values = {max_values}"
        raise HTTPException(TooLargeError.status, detail)
    try:
        raw = read_json(body, MAX_KEYS)
    except TooManyKeysError as error:
        raise HTTPException(TooLargeError.status, str(error)) from None
    except DuplicateKeyError as error:
        raise field_problems(error.locations, error.message) from None
    value, errors = field.validate(raw, {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    return raw, value


def _refuse_repeated_parameters(request: Request) -> None:
    counts = Counter(name for name, _ in request.query_params.multi_items())
    if repeated := [name for name, num in counts.items() if num > 1]:
        raise field_problems(repeated, "the query parameter occurs twice")
