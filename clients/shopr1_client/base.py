"""What the synchronous and the asynchronous client have in common.

Both do the same. A large request is split into parts (`parts.py`). Each part goes to the server that keeps
its prompts (`servers.py`), several at a time. It is tried again while an error may pass (`exchange.py`), on
the next server if there is one. Answers come back in the order of the request.
"""

import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol

import stamina

from shopr1_client import request_splitting as parts
from shopr1_client import transport as exchange
from shopr1_client.errors import NotReadyError, TransportError
from shopr1_client.request_splitting import DEFAULT_LIMITS, Part
from shopr1_client.wire import Info, Limits, ScoreRequest

DEFAULT_TIMEOUT_S = 600.0
"""A long prompt on a busy engine takes minutes; a training run should not die of it."""
DEFAULT_RETRY_FOR_S = 600.0
"""A server that is started anew loads its policy for minutes."""
_MAX_CONCURRENCY = 8
_MAX_WAIT_S = 10.0
_MAX_POLL_S = 0.5

OnProgress = Callable[[int], None]
"""Called with the number of rollouts that have been scored since the last call."""


class Retries(Protocol):
    """Attempts of stamina, for both kinds of loops."""

    def __iter__(self) -> Iterator[stamina.Attempt]: ...

    def __aiter__(self) -> AsyncIterator[stamina.Attempt]: ...


class BaseClient:
    """Settings, and what can be said of a request without sending it.

    Args:
        base_url: of a server, or of several that serve the same policy and recipes.
        api_key: sent as a bearer token.
        run: the training run's id, 1 to 64 of A-Z a-z 0-9 . _ -; the service's metrics tell runs apart by it.
        timeout_s: how long to wait for one answer; sent along, so that the server does not work in vain.
        retry_for_s: how long to try again while nothing but transient errors come; 0: never.
        max_concurrency: parts of one large request that are under way at a time.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        api_key: str | None = None,
        run: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry_for_s: float = DEFAULT_RETRY_FOR_S,
        max_concurrency: int = _MAX_CONCURRENCY,
    ) -> None:
        urls = [base_url] if isinstance(base_url, str) else base_url
        self._urls = [url.rstrip("/") for url in urls]
        if not self._urls:
            raise ValueError("no server is given")
        self._retry_for_s = retry_for_s
        self._max_concurrency = max_concurrency
        self._limits = DEFAULT_LIMITS
        self._http_options: dict[str, Any] = {
            "headers": exchange.headers(api_key, timeout_s, run),
            "timeout": exchange.timeout(timeout_s),
        }

    def _split(self, request: ScoreRequest) -> list[Part]:
        return parts.split(request, self._limits, self._urls)

    def _learn(self, infos: Sequence[Info]) -> bool:
        """Take over the servers' limits, the tightest of each; whether they are others than those known."""
        former = self._limits
        if infos:
            own = [info.limits.model_dump() for info in infos]
            self._limits = Limits(**{name: min(each[name] for each in own) for name in own[0]})
        return self._limits != former

    def _tries(self, urls: Sequence[str]) -> tuple["Retries", Iterator[str]]:
        """Attempts, as long as the error may pass, and the server of each."""
        return self._retries(), itertools.cycle(urls)

    def _retries(self) -> "Retries":
        """Attempts, as long as the error may pass."""
        return _retries(exchange.backoff, self._retry_for_s, max_wait_s=_MAX_WAIT_S)

    @staticmethod
    def _polls(timeout_s: float) -> "Retries":
        return _retries(_is_not_ready, timeout_s, max_wait_s=_MAX_POLL_S)


def _retries(on: Callable[[Exception], bool | float], retry_for_s: float, *, max_wait_s: float) -> "Retries":
    return stamina.retry_context(
        on=on,
        attempts=None if retry_for_s > 0 else 1,
        timeout=retry_for_s if retry_for_s > 0 else None,
        wait_max=max_wait_s,
        wait_jitter=max_wait_s / 10,
    )


def _is_not_ready(error: Exception) -> bool:
    is_wrong = isinstance(error, exchange.WrongUrlError)
    return isinstance(error, NotReadyError | TransportError) and not is_wrong
