"""A small synchronous client."""

import json
import time
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from shopr1_client.errors import NotReadyError, ProblemError, TransportError, from_problem
from shopr1_client.wire import Info, ScoreRequest, ScoreResponse

DEFAULT_TIMEOUT_S = 600.0
"""A long prompt on a busy engine takes minutes; a training run should not die of it."""
_POLL_INTERVAL_S = 0.2

_Model = TypeVar("_Model", bound=BaseModel)


class Client:
    """Calls a service at `base_url`.

    Raises (every method):
        TransportError: no answer.
        ProblemError: the subclass that the service's problem code stands for.
    """

    def __init__(self, base_url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s)

    def score(self, request: ScoreRequest) -> ScoreResponse:
        """Score groups of rollouts."""
        # json escapes half surrogate pairs, which a policy may have written; pydantic refuses them.
        content = json.dumps(request.model_dump(mode="python", exclude_none=True))
        return self._call(ScoreResponse, "POST", "/score", content=content)

    def info(self) -> Info:
        """The service's policy, limits and recipes."""
        return self._call(Info, "GET", "/info")

    def wait_until_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Return once the service can score.

        Raises:
            ProblemError, TransportError: the last obstacle, when `timeout_s` have passed.
        """
        give_up_at = time.monotonic() + timeout_s
        while True:
            try:
                self._request("GET", "/health/ready")
                return
            except (NotReadyError, TransportError):
                if time.monotonic() >= give_up_at:
                    raise
            time.sleep(_POLL_INTERVAL_S)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, model: type[_Model], method: str, path: str, **kwargs: Any) -> _Model:  # noqa: ANN401
        response = self._request(method, path, **kwargs)
        try:
            return model.model_validate_json(response.content)
        except ValidationError as error:
            raise TransportError(f"{method} {path}: not an answer of this service: {error}") from error

    def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:  # noqa: ANN401
        if "content" in kwargs:
            kwargs["headers"] = {"Content-Type": "application/json"}
        try:
            response = self._http.request(method, path, **kwargs)
        except httpx.TransportError as error:
            raise TransportError(f"{method} {path}: {error!r}") from error
        if response.is_success:
            return response
        raise _problem(response)


def _problem(response: httpx.Response) -> ProblemError:
    retry_after = response.headers.get("Retry-After", "")
    is_seconds = retry_after.isascii() and retry_after.isdigit()
    retry_after_s = float(retry_after) if is_seconds else None
    try:
        body = response.json()
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        return ProblemError(
            f"HTTP {response.status_code}: {response.text[:200]}", retry_after_s=retry_after_s
        )
    return from_problem(body, retry_after_s)
