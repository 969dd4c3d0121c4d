"""Large bodies, read beside the event loop: a health check must not wait until they are parsed.

The library's parser and validator hold the interpreter's lock from their first byte to their last, also on
another thread. So the number of JSON values is bounded before they are parsed, objects are built by a Python
function, which lets other threads run, and long lists are validated in pieces (`wire_base.IN_PIECES`).
"""

import json
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from shopr1_client.errors import TooLargeError
from shopr1_service.concurrency import in_pool
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
        RequestValidationError: they are not the model's; FastAPI makes it the cause of an `HTTPException`.
    """
    num_values = body.count(b",") + 1  # with those inside strings
    if num_values > max_values:
        detail = f"the body has up to {num_values} JSON values, by its commas; max_body_values = {max_values}"
        raise HTTPException(TooLargeError.status, detail)
    raw = json.loads(body, object_pairs_hook=_object if len(body) > MAX_INLINE_BYTES else None)
    value, errors = field.validate(raw, {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    return raw, value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # A function of Python's and not `dict`: only between such functions can other threads run.
    if len(pairs) > MAX_KEYS:
        detail = f"an object has {len(pairs)} keys, at most {MAX_KEYS} are read"
        raise HTTPException(TooLargeError.status, detail)
    return dict(pairs)
