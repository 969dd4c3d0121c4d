"""Facts about a request that middleware and routes share through its ASGI scope."""

from collections.abc import MutableMapping
from typing import Any

REQUEST_ID_HEADER = "X-Request-ID"
_SCOPE_KEY = "shopr1.request_id"
_SIZES_KEY = "shopr1.sizes"
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """The id of the request that this ASGI scope belongs to."""
    return str(scope.get(_SCOPE_KEY, ""))


def record_sizes(scope: MutableMapping[str, Any], **sizes: int) -> None:
    """Note how much a request wants scored, for the log."""
    scope[_SIZES_KEY] = sizes


def sizes_of(scope: MutableMapping[str, Any]) -> dict[str, int]:
    """What was noted; nothing of requests that score nothing."""
    return dict(scope.get(_SIZES_KEY, {}))
