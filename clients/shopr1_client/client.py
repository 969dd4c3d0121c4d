"""The synchronous client."""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, Self, TypeVar, Unpack

import httpx
from pydantic import BaseModel

from shopr1_client.base import DEFAULT_TIMEOUT_S, BaseClient, OnProgress
from shopr1_client.connections import RESENDABLE
from shopr1_client.errors import ProblemError, ShopR1Error, TooLargeError
from shopr1_client.request_splitting import Part, check, merge, relocated
from shopr1_client.transport import failure, idempotency_headers, parse
from shopr1_client.updates.plan import Answer, Source, UpdateOptions, plan
from shopr1_client.updates.updater import Updater
from shopr1_client.wire import Health, Info, ScoreRequest, ScoreResponse
from shopr1_client.wire_policy import PolicyState

_Model = TypeVar("_Model", bound=BaseModel)


class Client(BaseClient):
    """Synchronous, thread-safe. For arguments see `BaseClient`.

    Raises (every method):
        TransportError: no answer.
        ProblemError: the subclass of the service's problem code.
    """

    def __init__(self, base_url: str | Sequence[str], **options: Any) -> None:  # noqa: ANN401
        super().__init__(base_url, **options)
        self._http = self._open()

    def score(self, request: ScoreRequest, *, on_progress: OnProgress = lambda num: None) -> ScoreResponse:
        """Score any number of groups."""
        if self._must_learn(request):
            self._learn(self._infos())
        try:
            return self._score(request, on_progress)
        except TooLargeError:
            if not self._learn(self._infos()):
                raise
            return self._score(request, on_progress)

    def info(self) -> Info:
        """The service's policy, limits and recipes."""
        return self._try(Info, "GET", "/info", self._urls)

    def policy(self) -> PolicyState:
        """The loaded versions of the policy and of its adapters."""
        return self._try(PolicyState, "GET", "/policy", self._urls)

    def update_policy(self, source: Source, version: str, **options: Unpack[UpdateOptions]) -> Answer:
        """Send new weights to one server after the other; return once all score with them.

        Args:
            source: a model, a mapping of names to tensors, or the path of a checkpoint or an adapter that the
                servers can read. A model must not change meanwhile. Of a model with PEFT's LoRA adapters
                the active one is sent, or all weights with `merge`.
            version: name of the weights, 1 to 256 characters.
            options: see `UpdateOptions`.

        Returns:
            The last server's answer. If it was lost although the update succeeded, its counts are 0,
            `pause_s` is None, and `duration_s` is measured by this client.

        Raises:
            ValueError: the model cannot be sent, for example because it is sharded; the message has advice.
            UnsendableModelError: a model of PEFT's computes with more than its adapter, or without it.
            VerificationError: a server gives other numbers than the model (`verify`).
            InvalidWeightsError: the weights do not fit the policy.
            MixedVersionsError: only some servers have the new weights.
        """
        return Updater(self._http, self._urls, self._retries).run(plan(source, version, options))

    def wait_until_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Return once every server can score.

        Raises:
            ProblemError, TransportError: the last error, after `timeout_s`.
        """
        for url, attempts in self._polls(timeout_s):
            for attempt in attempts:
                with attempt:
                    self._send(Health, "GET", url)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _infos(self) -> list[Info]:
        """The answers of all reachable servers."""
        infos = []
        for url in self._urls:
            with contextlib.suppress(ShopR1Error):
                infos.append(self._send(Info, "GET", f"{url}/info"))
        return infos

    def _score(self, request: ScoreRequest, on_progress: OnProgress) -> ScoreResponse:
        parts = self._split(request)
        if len(parts) == 1:
            return merge(request, parts, [self._score_part(parts[0], on_progress)])
        pool, is_over = ThreadPoolExecutor(self._max_concurrency), threading.Event()
        try:
            futures = [pool.submit(self._score_part, part, on_progress, is_over.is_set) for part in parts]
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [f for f in futures if f.done() and f.exception()]
            return merge(request, parts, [future.result() for future in failed or futures])
        finally:  # without waiting for the other parts, which may take minutes
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _score_part(
        self, part: Part, on_progress: OnProgress, is_over: Callable[[], bool] = lambda: False
    ) -> ScoreResponse:
        try:
            answer = self._try(
                ScoreResponse, "POST", "/score", part.urls, part.body, idempotency_headers(), is_over
            )
        except ProblemError as error:
            raise relocated(error, part) from None
        check(part, answer)
        if not is_over():
            on_progress(part.num_rollouts)
        return answer

    def _try(
        self,
        model: type[_Model],
        method: str,
        path: str,
        urls: Sequence[str],
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> _Model:
        retries, servers = self._tries(urls, is_over)
        for attempt in retries:
            with attempt:
                return self._send(model, method, next(servers) + path, body, headers)
        raise AssertionError("the last attempt raises")

    def _send(
        self,
        model: type[_Model],
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> _Model:
        try:
            response = self._http.request(
                method, url, content=body, headers=headers, extensions={RESENDABLE: True}
            )
        except httpx.RequestError as error:
            raise failure(f"{method} {url}", error) from error
        return parse(model, response)
