"""Calls that may take minutes or never return, on threads that the end of the process does not wait for."""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from shopr1_client.errors import StorageError

_Result = TypeVar("_Result")


async def in_daemon_thread(work: Callable[[], _Result], name: str) -> _Result:
    """What `work` returns, on a thread of its own, with the caller's context variables.

    If this is cancelled, the thread goes on by itself.

    Args:
        name: of the thread.
    """
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    future: asyncio.Future[_Result] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: object) -> None:
        if not future.done():
            set_outcome(outcome)

    def report(set_outcome: Callable[[Any], None], outcome: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, set_outcome, outcome)

    def run() -> None:
        try:
            result = context.run(work)
        except BaseException as error:  # handed over, whatever it is
            report(future.set_exception, error)
        else:
            report(future.set_result, result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await future


async def read_foreign(read: Callable[[], _Result], timeout_s: float) -> _Result:
    """What `read` returns, on a thread that is left to itself if that takes too long.

    Args:
        timeout_s: setting `read_timeout_s`.

    Raises:
        StorageError: it took longer. `read` may still be running then.
    """
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            return await in_daemon_thread(read, "foreign-read")
    except TimeoutError as error:
        if not deadline.expired():  # the file system itself gave up
            raise
        message = f"the files have not been read within read_timeout_s = {timeout_s:g} s"
        raise StorageError(message) from error
