"""Work beside the event loop: on threads that stop when nobody waits for their result any more.

Foreign calls that may never return run on threads that the end of the process does not wait for.
"""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import ContextVar
from typing import Any, TypeVar

from shopr1_client.errors import StorageError

_Result = TypeVar("_Result")

_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


class StoppedError(Exception):
    """The caller does not wait for the work any more: its deadline has passed, or its client has gone."""


def checkpoint() -> None:
    """Raise `StoppedError` if the caller of `in_pool` was cancelled; called between pieces of long work."""
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise StoppedError


async def in_pool(pool: Executor | None, work: Callable[[], _Result]) -> _Result:
    """Call `work` on a thread of `pool` with the caller's context variables; return its result.

    Without a pool it is the event loop's own.

    If the call is cancelled, the work ends at its next `checkpoint`.
    """
    stop, context = threading.Event(), contextvars.copy_context()
    context.run(_stop.set, stop)
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, context.run, work)
    except asyncio.CancelledError:
        stop.set()
        raise


async def in_daemon_thread(work: Callable[[], _Result], name: str) -> _Result:
    """Call `work` on a daemon thread with the caller's context variables; return its result.

    If the call is cancelled, the thread continues and its result is dropped.

    Args:
        name: the thread's name.
    """
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    future: asyncio.Future[_Result] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: object) -> None:
        if not future.done():
            set_outcome(outcome)

    def report(set_outcome: Callable[[Any], None], outcome: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, set_outcome, outcome)

    def run() -> None:
        try:
            result = context.run(work)
        except BaseException as error:  # the caller gets it
            report(future.set_exception, error)
        else:
            report(future.set_result, result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await future


async def read_foreign(read: Callable[[], _Result], timeout_s: float) -> _Result:
    """Read files whose file system may hang, on a daemon thread that is abandoned after `timeout_s`.

    Args:
        timeout_s: setting `read_timeout_s`.

    Raises:
        StorageError: it took longer; `read` may still be running.
    """
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            return await in_daemon_thread(read, "foreign-read")
    except TimeoutError as error:
        if not deadline.expired():  # the file system itself gave up
            raise
        message = f"the files have not been read within read_timeout_s = {timeout_s:g} s"
        raise StorageError(message) from error
