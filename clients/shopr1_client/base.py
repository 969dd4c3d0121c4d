"""Base of the synchronous and the asynchronous client.

Both split a large request into parts (`request_splitting.py`). Each part is sent to the server that caches
its prompts, several at a time. Transient errors are retried (`transport.py`), on the next server if there is
one. Answers are merged in the order of the request.
"""

import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol

import httpx
import stamina

from shopr1_client.errors import NotReadyError, SettingsError, TransportError
from shopr1_client.proxies import async_connections, sync_connections, url_flaw, without_passwords
from shopr1_client.request_splitting import DEFAULT_LIMITS, Part, split
from shopr1_client.transport import WrongUrlError, backoff, headers, timeout
from shopr1_client.wire import Info, Limits, ScoreRequest

DEFAULT_TIMEOUT_S = 600.0
"""A long prompt on a busy engine takes minutes, which should not end a training run."""
DEFAULT_RETRY_FOR_S = 600.0
"""A restarted server takes minutes to load its policy."""
_MAX_CONCURRENCY = 8
_MAX_WAIT_S = 10.0
_MAX_POLL_S = 0.5

_logger = logging.getLogger(__name__)

OnProgress = Callable[[int], None]
"""Called with the number of rollouts scored since the last call."""


class Retries(Protocol):
    """Attempts of stamina, for `for` and `async for`."""

    def __iter__(self) -> Iterator[stamina.Attempt]: ...

    def __aiter__(self) -> AsyncIterator[stamina.Attempt]: ...


class BaseClient:
    """Settings of a client, and the steps that need no connection.

    Args:
        base_url: URL of a server, or of several that serve the same policy and recipes.
        api_key: sent as a bearer token.
        run: the training run's id, 1 to 64 of A-Z a-z 0-9 . _ -, a label of the service's metrics.
        timeout_s: how long to wait for an answer; also sent to the server as the request's deadline.
        retry_for_s: how long to retry transient errors; 0: never.
        max_concurrency: parts of a large request that are sent at the same time.
        proxy: None: the environment's (`HTTP_PROXY`, `NO_PROXY` …), but none for loopback and private hosts;
            `direct`: none; else the URL of a proxy for every server.

    Raises:
        SettingsError: a URL is not one of a server, or a header cannot hold the key or the run.
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
        proxy: str | None = None,
    ) -> None:
        self._urls = checked_urls([base_url] if isinstance(base_url, str) else base_url)
        self._proxy = proxy
        self._retry_for_s = retry_for_s
        self._max_concurrency = max_concurrency
        self._limits = DEFAULT_LIMITS
        self._has_learned = False
        self._http_options: dict[str, Any] = {
            "headers": headers(api_key, timeout_s, run),
            "timeout": timeout(timeout_s),
        }

    def _open(self) -> httpx.Client:
        return httpx.Client(**self._http_options, **sync_connections(self._urls, self._proxy))

    def _open_async(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self._http_options, **async_connections(self._urls, self._proxy))

    def _split(self, request: ScoreRequest) -> list[Part]:
        return split(request, self._limits, self._urls)

    def _must_learn(self, request: ScoreRequest) -> bool:
        """Whether to ask for the limits first: a part that is refused would have the others counted twice."""
        return not self._has_learned and len(self._split(request)) > 1

    def _learn(self, infos: Sequence[Info]) -> bool:
        """Adopt the servers' limits, the tightest of each; whether they differ from the known ones."""
        known = self._limits
        if infos:
            limits = [info.limits.model_dump() for info in infos]
            self._limits = Limits(**{name: min(each[name] for each in limits) for name in limits[0]})
            self._has_learned = True
        return self._limits != known

    def _tries(
        self, urls: Sequence[str], is_over: Callable[[], bool] = lambda: False
    ) -> tuple["Retries", Iterator[str]]:
        """Attempts while errors are transient and the call is not over, and the server of each."""
        return self._retries(is_over), itertools.cycle(urls)

    def _retries(self, is_over: Callable[[], bool] = lambda: False) -> "Retries":
        """Attempts while errors are transient."""

        def on(error: Exception) -> bool | float:
            return not is_over() and _logged_backoff(error)

        return _retries(on, self._retry_for_s, max_wait_s=_MAX_WAIT_S)

    def _polls(self, timeout_s: float) -> Iterator[tuple[str, "Retries"]]:
        """The health check of each server, with attempts until it is ready or the time for all is over."""
        deadline_s = time.monotonic() + timeout_s
        for url in self._urls:
            left_s = max(0.0, deadline_s - time.monotonic())
            yield f"{url}/health/ready", _retries(_is_not_ready, left_s, max_wait_s=_MAX_POLL_S)


def checked_urls(urls: Sequence[str]) -> list[str]:
    """The servers' URLs without blanks and slashes at their ends.

    Raises:
        SettingsError: there is none, or one is not a URL of a server.
    """
    if not urls:
        raise SettingsError("no server is given")
    for url in urls:
        if flaw := url_flaw(url.strip(), ("http", "https")):
            raise SettingsError(f"{without_passwords(url)!r} is not the URL of a server: {flaw}")
    return [url.strip().rstrip("/") for url in urls]


def _logged_backoff(error: Exception) -> bool | float:
    """`backoff`; logs what is retried, because a run may wait for minutes."""
    decision = backoff(error)
    if decision is not False:
        _logger.warning("a request failed, and can be retried: %s", error)
    return decision


def _retries(on: Callable[[Exception], bool | float], retry_for_s: float, *, max_wait_s: float) -> "Retries":
    return stamina.retry_context(
        on=on,
        attempts=None if retry_for_s > 0 else 1,
        timeout=retry_for_s if retry_for_s > 0 else None,
        wait_max=max_wait_s,
        wait_jitter=max_wait_s / 10,
    )


def _is_not_ready(error: Exception) -> bool:
    return isinstance(error, NotReadyError | TransportError) and not isinstance(error, WrongUrlError)
