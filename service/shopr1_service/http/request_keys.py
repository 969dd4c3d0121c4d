"""Keys of a request: one of its content, which other requests may have, and one of its own.

A client that may send a request again gives it a key, the same at every try:

    Idempotency-Key: 5f0c1d5e…     a key of its own, for instance a UUID
    X-Request-ID: step-7/rollout-3 else the request's id, if the client sent one
"""

import hashlib
import json
import re

import orjson
from asgi_correlation_id import correlation_id
from fastapi import Request
from pydantic import BaseModel

from shopr1_client.errors import InvalidRequestError, MalformedBodyError
from shopr1_client.transport import IDEMPOTENCY_HEADER
from shopr1_client.wire import ScoreRequest
from shopr1_service.concurrency import checkpoint
from shopr1_service.field_errors import field_problem
from shopr1_service.http.problems import REQUEST_ID_HEADER

IDEMPOTENCY_PATTERN = "[!-~]{1,255}"
_KEY = re.compile(IDEMPOTENCY_PATTERN)
_DIGEST_BYTES = 32


def content_key(body: ScoreRequest, run: str) -> bytes:
    """Digest that is equal for requests of a run with the same content, by whichever route they arrive."""
    hasher = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    head = {name: value for name, value in vars(body).items() if name != "groups"}
    try:
        for part in ([run, head], *map(vars, body.groups)):
            checkpoint()
            hasher.update(_encode(part) + b"\n")
    except RecursionError:  # reading JSON takes fewer frames than writing it
        raise MalformedBodyError("the body is nested too deeply") from None
    return hasher.digest()


def _encode(part: object) -> bytes:
    # `orjson` writes NaN as null. Only keys of a ground truth that no recipe reads can hold one.
    try:
        return orjson.dumps(part, default=BaseModel.model_dump)
    except orjson.JSONEncodeError:  # half a surrogate pair, an integer beyond 64 bits, deep nesting
        return json.dumps(part, default=BaseModel.model_dump).encode()


def own_key(request: Request, content: bytes) -> bytes | None:
    """Digest that is equal for the tries of one request; None if nothing tells them from other requests.

    The content is a part of it: a client that uses an id again for something else sends another request.

    Raises:
        InvalidRequestError: the header is not a key.
    """
    key = request.headers.get(IDEMPOTENCY_HEADER)
    if key is not None:
        if not _KEY.fullmatch(key):
            message = "must be 1 to 255 printable ASCII characters without blanks"
            raise field_problem(InvalidRequestError, f"header.{IDEMPOTENCY_HEADER}", message)
        return _digest(b"key", key.encode(), content)
    # One that is malformed has been replaced by an id of the service's own.
    sent = request.headers.get(REQUEST_ID_HEADER)
    return _digest(b"id", sent.encode(), content) if sent and sent == correlation_id.get() else None


def _digest(*parts: bytes) -> bytes:
    # No part but the last can hold a zero byte.
    return hashlib.blake2b(b"\0".join(parts), digest_size=_DIGEST_BYTES).digest()
