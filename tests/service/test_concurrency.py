"""Calls on daemon threads: results, errors, context, and file systems that hang."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import pytest

from shopr1_client.errors import StorageError
from shopr1_service.concurrency import StoppedError, checkpoint, in_daemon_thread, in_pool, read_foreign

pytestmark = pytest.mark.anyio

LONG_S = 60.0
variable: ContextVar[str] = ContextVar("variable")


async def test_the_result_and_the_callers_context() -> None:
    variable.set("the caller's")
    seen: list[threading.Thread] = []

    def work() -> str:
        seen.append(threading.current_thread())
        return variable.get()

    assert await in_daemon_thread(work, "a name") == "the caller's"
    assert (seen[0].daemon, seen[0].name) == (True, "a name")


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), SystemExit(3)])
async def test_every_error_is_raised(error: BaseException) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error)):
        await in_daemon_thread(work, "a name")


async def test_a_cancelled_call_leaves_its_thread_alone() -> None:
    gate, done = threading.Event(), threading.Event()

    def work() -> None:
        gate.wait(LONG_S)
        done.set()

    call = asyncio.create_task(in_daemon_thread(work, "a name"))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gate.set()
    assert await asyncio.to_thread(done.wait, LONG_S)


async def test_a_read_that_hangs_is_abandoned() -> None:
    gate = threading.Event()
    with pytest.raises(StorageError, match=r"read_timeout_s = 0\.05 s"):
        await read_foreign(lambda: gate.wait(LONG_S), 0.05)
    gate.set()
    assert await read_foreign(lambda: 7, LONG_S) == 7


async def test_a_timeout_of_the_file_system_itself_is_raised() -> None:
    def read() -> None:
        raise TimeoutError("NFS")

    with pytest.raises(TimeoutError, match="NFS"):
        await read_foreign(read, LONG_S)


# --- work that stops ----------------------------------------------------------------------------------


async def test_the_result_of_a_pool_and_the_callers_context() -> None:
    variable.set("the caller's")
    with ThreadPoolExecutor(1) as pool:
        assert await in_pool(pool, variable.get) == "the caller's"
        with pytest.raises(ZeroDivisionError):
            await in_pool(pool, lambda: 1 // 0)


async def test_cancelled_work_ends_at_its_next_checkpoint() -> None:
    begun, cancelled, stopped = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        checkpoint()
        begun.set()
        assert cancelled.wait(LONG_S)
        try:
            checkpoint()
        except StoppedError:
            stopped.set()
            raise

    with ThreadPoolExecutor(1) as pool:
        task = asyncio.ensure_future(in_pool(pool, work))
        assert await asyncio.to_thread(begun.wait, LONG_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled.set()
        assert await asyncio.to_thread(stopped.wait, LONG_S)


def test_a_checkpoint_of_any_other_work_does_nothing() -> None:
    checkpoint()
