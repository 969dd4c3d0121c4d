"""Bounds the work on a request: its deadline, its client's connection and the end of the service."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from fastapi import Request
from starlette.types import Message

from shopr1_client.errors import DeadlineExceededError, NotReadyError
from shopr1_service.errors import RETRY_AFTER_S

_Result = TypeVar("_Result")

_NUM_TURNS = 8
"""Turns of the event loop in which work that waits for no other thread is done; a task takes two or three."""


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
    due_s = asyncio.get_running_loop().time() + timeout_s
    try:
        # Most single rollouts are scored within a few turns of the loop, in less time than watching takes.
        for _ in range(_NUM_TURNS):
            if task.done():
                break
            await asyncio.sleep(0)
        else:
            await _watch(task, request, due_s, shutdown)
        if _has_disconnected(request):  # even with a result: nobody receives it
            raise ClientDisconnectedError
        if task.done():
            return task.result()
        if shutdown.is_set():
            raise NotReadyError("the service is shutting down; not scored", retry_after_s=RETRY_AFTER_S)
        raise DeadlineExceededError(f"not scored within {timeout_s:g} s; what was still queued is dropped")
    finally:
        await _end(task)  # also when this call itself is cancelled, as at shutdown


async def _watch(
    task: "asyncio.Future[Any]", request: Request, due_s: float, shutdown: asyncio.Event
) -> None:
    """Wait for the first of: the task is done, the deadline, the client's disconnect, the end."""
    timeout_s = max(0.0, due_s - asyncio.get_running_loop().time())
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    end = asyncio.ensure_future(shutdown.wait())
    try:
        await asyncio.wait({task, disconnect, end}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _end(disconnect, end)


async def _end(*tasks: "asyncio.Future[Any]") -> None:
    for each in tasks:
        each.cancel()
    if not all(each.done() for each in tasks):
        await asyncio.wait(tasks)
    for each in tasks:
        if not each.cancelled():
            each.exception()  # read, or asyncio warns where it was not raised


def _has_disconnected(request: Request) -> bool:
    """Whether the message that the client has disconnected is there: the next one, the body has been read."""
    receiving = cast("Coroutine[Any, Any, Message]", request.receive())
    try:
        receiving.send(None)  # up to where it would wait
    except StopIteration as message:
        return bool(message.value["type"] == "http.disconnect")
    finally:
        receiving.close()
    return False


async def _wait_for_disconnect(request: Request) -> None:
    """Return when the client disconnects. The body has been read: no other message can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
