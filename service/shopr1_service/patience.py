"""How long a request is worked on: until its deadline, and as long as its client is there."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from shopr1_client.errors import DeadlineExceededError

_Result = TypeVar("_Result")


class ClientGoneError(Exception):
    """The client has closed the connection: nobody reads an answer."""


async def within(work: Coroutine[Any, Any, _Result], request: Request, timeout_s: float) -> _Result:
    """The result of `work`, which is cancelled when the time is up or the client has gone.

    Raises:
        DeadlineExceededError: `timeout_s` have passed.
        ClientGoneError: see there.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGoneError
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
