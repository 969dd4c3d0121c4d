"""HTTP details that both clients share: headers, timeouts, parsing of answers, errors, retries."""

from collections.abc import Mapping
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from shopr1_client.errors import (
    DeadlineExceededError,
    PolicyVersionError,
    ProblemError,
    TransportError,
    from_problem,
)

_Model = TypeVar("_Model", bound=BaseModel)

_CONNECT_TIMEOUT_S = 10.0
_TRANSIENT_STATUSES = frozenset({408, 429, 502, 503, 504})
"""Statuses of the service, and of gateways that cannot reach it."""


class WrongUrlError(TransportError):
    """The URL is not one of this service: its scheme is not HTTP, or another server answered."""


def timeout(timeout_s: float) -> httpx.Timeout:
    # Waiting for a connection of the client's own pool is not a failure of the server.
    return httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S), pool=None)


def headers(api_key: str | None, timeout_s: float, run: str | None = None) -> dict[str, str]:
    """Headers of every request. The timeout lets the service drop work that the client gave up on."""
    values = {
        "X-Request-Timeout": f"{timeout_s:g}",
        "Content-Type": "application/json",
        "Authorization": None if api_key is None else f"Bearer {api_key}",
        "X-Run-ID": run,
    }
    return {name: value for name, value in values.items() if value is not None}


def failure(what: str, error: httpx.TransportError) -> TransportError:
    """The error of a request without an answer."""
    error_class = WrongUrlError if isinstance(error, httpx.UnsupportedProtocol) else TransportError
    return error_class(f"{what}: {error!r}")


def parse(model: type[_Model], response: httpx.Response) -> _Model:
    """Parse an answer.

    Raises:
        ProblemError: the subclass of the answer's problem code.
        WrongUrlError: not an answer of this service.
    """
    if not response.is_success:
        raise _problem(response)
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        raise WrongUrlError(f"{response.url}: not an answer of this service: {error}") from error


def backoff(error: Exception) -> bool | float:
    """Whether to retry, and after how many seconds if the service specifies it (a hook for stamina).

    Rejections are permanent, and a missed deadline is left to the caller. Waiting for a version is part of
    the request (`wait_s`).
    """
    if isinstance(error, PolicyVersionError):
        return False
    if isinstance(error, ProblemError):
        if error.retry_after_s is not None:
            return error.retry_after_s
        return error.status in _TRANSIENT_STATUSES and not isinstance(error, DeadlineExceededError)
    return isinstance(error, TransportError) and not isinstance(error, WrongUrlError)


def _problem(response: httpx.Response) -> ProblemError:
    retry_after_s = _seconds(response.headers)
    try:
        body = response.json()
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        body = {"detail": f"HTTP {response.status_code}: {response.text[:200]}"}
    return from_problem(body, response.status_code, retry_after_s)


def _seconds(headers: Mapping[str, str]) -> float | None:
    retry_after = headers.get("Retry-After", "")
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else None
