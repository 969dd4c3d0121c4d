"""How long a request is worked on: until its deadline, while its client is there and the service stays."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from shopr1_client.errors import DeadlineExceededError, NotReadyError

RETRY_AFTER_S = 5.0
"""When to try again what a service that starts or ends did not do."""

_Result = TypeVar("_Result")


class ClientDisconnectedError(Exception):
    """The client has closed the connection: nobody reads an answer."""


class ShutdownSignal:
    """Ends all waiting at once, for good. Used from the event loop only."""

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None

    @property
    def future(self) -> "asyncio.Future[None]":
        """Done when the time has come."""
        if self._future is None:
            self._future = asyncio.get_running_loop().create_future()
        return self._future

    def set(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


async def within(
    work: Coroutine[Any, Any, _Result], request: Request, timeout_s: float, cutoff: ShutdownSignal
) -> _Result:
    """The result of `work`, which is cancelled when the time is up or the client has gone.

    Raises:
        DeadlineExceededError: `timeout_s` have passed.
        ClientDisconnectedError: see there.
        NotReadyError: the service ends; another, or this one when it is back, will do the work.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        ends: set[asyncio.Future[Any]] = {task, gone, cutoff.future}
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnectedError
        if cutoff.future.done():
            raise NotReadyError("the service ends, this was not scored", retry_after_s=RETRY_AFTER_S)
        raise DeadlineExceededError(f"not scored within {timeout_s:g} s; what still waited of it is dropped")
    finally:
        # Also when this call itself is cancelled, as at shutdown.
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})


async def _disconnect(request: Request) -> None:
    """Returns when the client goes. The body has been read; nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
