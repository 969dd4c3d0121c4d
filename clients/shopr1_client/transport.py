"""HTTP details that both clients share: headers, timeouts, parsing of answers, errors, retries."""

import re
import uuid
from collections.abc import Mapping
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from shopr1_client.errors import (
    DeadlineExceededError,
    PolicyVersionError,
    ProblemError,
    SettingsError,
    TransportError,
    from_problem,
)
from shopr1_client.proxies import NOTE

_Model = TypeVar("_Model", bound=BaseModel)

IDEMPOTENCY_HEADER = "Idempotency-Key"
_CONNECT_TIMEOUT_S = 10.0
_HEADER_VALUE = re.compile(r"[!-~]([ -~]*[!-~])?")
_TRANSIENT_STATUSES = frozenset({408, 429, 502, 503, 504})
"""Statuses of the service, and of gateways that cannot reach it."""


class WrongUrlError(TransportError):
    """The URL is not one of this service: another server answered."""


def timeout(timeout_s: float) -> httpx.Timeout:
    # Waiting for a connection of the client's own pool is not a failure of the server.
    return httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S), pool=None)


def headers(api_key: str | None, timeout_s: float, run: str | None = None) -> dict[str, str]:
    """Headers of every request. The timeout lets the service drop work that the client gave up on.

    Raises:
        SettingsError: the key or the run has a character that no header can hold.
    """
    for value in (api_key, run):
        if value is not None:
            check_header_value(value)
    values = {
        "X-Request-Timeout": f"{timeout_s:g}",
        "Content-Type": "application/json",
        "Authorization": None if api_key is None else f"Bearer {api_key}",
        "X-Run-ID": run,
    }
    return {name: value for name, value in values.items() if value is not None}


def idempotency_headers() -> dict[str, str]:
    """Headers of all tries of one request: the service counts its rollouts once."""
    return {IDEMPOTENCY_HEADER: uuid.uuid4().hex}


def check_header_value(value: str) -> str:
    """The value of a header, such as an API key, if it is one.

    Raises:
        SettingsError: without the value, which may be secret.
    """
    if not _HEADER_VALUE.fullmatch(value):
        raise SettingsError(
            "an API key or a run is empty, has blanks at its ends, or characters that are not printable ASCII"
        )
    return value


def failure(what: str, error: httpx.RequestError) -> TransportError:
    """The error of a request without an answer that can be read."""
    return TransportError(f"{what}: {error!r}")


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
        raise WrongUrlError(
            f"{response.url}: not an answer of this service{_note(response)}: {error}"
        ) from error


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
    if "code" not in body:  # the answer of another server, such as a proxy
        body["detail"] = f"{body.get('detail', body)}{_note(response)}"
    return from_problem(body, response.status_code, retry_after_s)


def _note(response: httpx.Response) -> str:
    """The proxy that a response came through, or that sent it."""
    note = response.extensions.get(NOTE)
    return f" ({note})" if note else ""


def _seconds(headers: Mapping[str, str]) -> float | None:
    retry_after = headers.get("Retry-After", "")
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else None
