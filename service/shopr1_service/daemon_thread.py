"""Work that nothing waits for when the process ends: it takes minutes, or never returns."""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

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
