"""Routes that refuse a request which gives something twice: a key of a JSON object, or a query parameter.

FastAPI and Starlette would take the last of them without a word.
"""

from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from shopr1_client.errors import FieldError, InvalidRequestError, summary
from shopr1_client.json_text import DuplicateKeyError, read_json
from shopr1_service.field_errors import raise_if_any


class StrictRoute(APIRoute):
    """The `route_class` of every router with bodies or query parameters."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            counts = Counter(name for name, _ in request.query_params.multi_items())
            message = "the query parameter occurs twice"
            raise_if_any([{"location": name, "message": message} for name in counts if counts[name] > 1])
            return await handle(_Request(request.scope, request.receive))

        return handle_strictly


class _Request(Request):
    async def json(self) -> Any:  # noqa: ANN401  # as Starlette's
        """The body.

        Raises:
            InvalidRequestError: an object in it has a key twice. FastAPI turns it into an HTTPException, and
                `problems.py` back into a problem.
        """
        if not hasattr(self, "_json"):
            try:
                self._json = read_json(await self.body())
            except DuplicateKeyError as error:
                errors: list[FieldError] = [
                    {"location": location, "message": error.message} for location in error.locations
                ]
                raise InvalidRequestError(summary(errors), errors=errors) from None
        return self._json
