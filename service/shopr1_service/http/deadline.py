"""Bounds the work on a request: its deadline, its client's connection and the end of the service."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from shopr1_client.errors import DeadlineExceededError, NotReadyError
from shopr1_service.errors import RETRY_AFTER_S

_Result = TypeVar("_Result")


class ClientDisconnectedError(Exception):
    """The client has closed the connection and reads no response."""


async def run_until_deadline(
    work: Coroutine[Any, Any, _Result], request: Request, timeout_s: float, shutdown: asyncio.Event
) -> _Result:
    """The result of `work`, which is cancelled at the deadline and when the client disconnects.

    Args:
        shutdown: set when the service ends; it cancels the work as well.

    Raises:
        DeadlineExceededError: `timeout_s` have passed.
        ClientDisconnectedError: the client has closed the connection.
        NotReadyError: the service ends. Another one, or this one after its restart, can do the work.
    """
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    end = asyncio.ensure_future(shutdown.wait())
    tasks: set[asyncio.Future[Any]] = {task, disconnect, end}
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if disconnect.done():  # even with a result: nobody receives it
            raise ClientDisconnectedError
        if task.done():
            return task.result()
        if end.done():
            raise NotReadyError("the service is shutting down; not scored", retry_after_s=RETRY_AFTER_S)
        raise DeadlineExceededError(f"not scored within {timeout_s:g} s; what was still queued is dropped")
    finally:
        # Also when this call itself is cancelled, as at shutdown.
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)
        if not task.cancelled():
            task.exception()  # read, or asyncio warns where it was not raised


async def _wait_for_disconnect(request: Request) -> None:
    """Return when the client disconnects. The body has been read: no other message can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
