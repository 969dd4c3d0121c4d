"""Responses whose content was validated where it was built."""

from typing import Any

import orjson
from fastapi import Response
from pydantic import BaseModel


def json_answer(model: BaseModel) -> Response:
    """A model as the body of an answer."""
    # Validated where it was built; FastAPI would validate it once more.
    return Response(model.model_dump_json(), media_type="application/json")


def json_response(value: Any) -> Response:  # noqa: ANN401  # whatever JSON can hold
    """An answer that was validated where it was built; FastAPI would validate it once more."""
    return Response(orjson.dumps(value), media_type="application/json")
