"""The asynchronous client."""

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Self, TypeVar, Unpack

import httpx
from pydantic import BaseModel

from shopr1_client.base import DEFAULT_TIMEOUT_S, BaseClient, OnProgress
from shopr1_client.connections import RESENDABLE
from shopr1_client.errors import ProblemError, ShopR1Error, TooLargeError
from shopr1_client.request_splitting import Part, check, merge, relocated
from shopr1_client.transport import failure, idempotency_headers, parse
from shopr1_client.updates.plan import Answer, Change, Source, UpdateOptions, plan
from shopr1_client.updates.updater import Updater
from shopr1_client.wire import Health, Info, ScoreRequest, ScoreResponse
from shopr1_client.wire_policy import PolicyState

_Model = TypeVar("_Model", bound=BaseModel)


class AsyncClient(BaseClient):
    """Asynchronous. For arguments see `BaseClient`.

    Within `async with`, connections are reused. Outside of it each call opens its own, so that trainers that
    create an event loop for every batch can keep a client.

    Raises (every method):
        TransportError: no answer.
        ProblemError: the subclass of the service's problem code.
    """

    _http: httpx.AsyncClient | None = None

    async def score(
        self, request: ScoreRequest, *, on_progress: OnProgress = lambda num: None
    ) -> ScoreResponse:
        """Score any number of groups."""
        async with self._connected() as client:
            if client._must_learn(request):
                client._learn(await client._infos())
            try:
                return await client._score(request, on_progress)
            except TooLargeError:
                if not client._learn(await client._infos()):
                    raise
                return await client._score(request, on_progress)
            finally:
                self._limits, self._has_learned = client._limits, client._has_learned

    async def info(self) -> Info:
        """The service's policy, limits and recipes."""
        async with self._connected() as client:
            return await client._try(Info, "GET", "/info", self._urls)

    async def policy(self) -> PolicyState:
        """The loaded versions of the policy and of its adapters."""
        async with self._connected() as client:
            return await client._try(PolicyState, "GET", "/policy", self._urls)

    async def update_policy(self, source: Source, version: str, **options: Unpack[UpdateOptions]) -> Answer:
        """See `Client.update_policy`. A thread reads the tensors, and continues if this is cancelled."""
        return await asyncio.to_thread(self._update, plan(source, version, options))

    async def wait_until_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Return once every server can score.

        Raises:
            ProblemError, TransportError: the last error, after `timeout_s`.
        """
        async with self._connected() as client:
            for url, attempts in self._polls(timeout_s):
                async for attempt in attempts:
                    with attempt:
                        await client._send(Health, "GET", url)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def __aenter__(self) -> Self:
        self._http = self._open_async()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def _update(self, change: Change) -> Answer:
        with self._open() as http:
            return Updater(http, self._urls, self._retries).run(change)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator["AsyncClient"]:
        if self._http is not None:
            yield self
        else:
            async with copy.copy(self) as own:
                yield own

    async def _infos(self) -> list[Info]:
        """The answers of all reachable servers."""
        infos = []
        for url in self._urls:
            with contextlib.suppress(ShopR1Error):
                infos.append(await self._send(Info, "GET", f"{url}/info"))
        return infos

    async def _score(self, request: ScoreRequest, on_progress: OnProgress) -> ScoreResponse:
        parts = self._split(request)
        free = asyncio.Semaphore(self._max_concurrency)

        async def score_part(part: Part) -> ScoreResponse:
            async with free:
                return await self._score_part(part, on_progress)

        tasks = [asyncio.ensure_future(score_part(part)) for part in parts]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # they close their connections
        return merge(request, parts, answers)

    async def _score_part(self, part: Part, on_progress: OnProgress) -> ScoreResponse:
        try:
            answer = await self._try(
                ScoreResponse, "POST", "/score", part.urls, part.body, idempotency_headers()
            )
        except ProblemError as error:
            raise relocated(error, part) from None
        check(part, answer)
        on_progress(part.num_rollouts)
        return answer

    async def _try(
        self,
        model: type[_Model],
        method: str,
        path: str,
        urls: Sequence[str],
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> _Model:
        retries, servers = self._tries(urls)
        async for attempt in retries:
            with attempt:
                return await self._send(model, method, next(servers) + path, body, headers)
        raise AssertionError("the last attempt raises")

    async def _send(
        self,
        model: type[_Model],
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> _Model:
        assert self._http is not None  # see `_connected`
        try:
            response = await self._http.request(
                method, url, content=body, headers=headers, extensions={RESENDABLE: True}
            )
        except httpx.RequestError as error:
            raise failure(f"{method} {url}", error) from error
        return parse(model, response)
