"""Reading files of others: their file system may hang, and nothing else must hang with it."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from shopr1_client.errors import StorageError
from shopr1_service.daemon_thread import in_daemon_thread

_Result = TypeVar("_Result")


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
