"""The asynchronous client: its connections, event loops and cancellation."""

import asyncio
import threading

import pytest

from shopr1_client import AsyncClient
from shopr1_client.wire import Group, ScoreRequest
from shopr1_service.policy.fake import FakePolicy
from tests.support.http import TERMINATE, WAIT_S, answer, served

REQUEST = ScoreRequest(groups=[Group(prompt="p", ground_truth=TERMINATE, completions=[answer()])])


def test_one_event_loop_after_the_other() -> None:
    with served() as url:
        client = AsyncClient(url)
        for _ in range(3):
            response = asyncio.run(client.score(REQUEST))
            assert [reward.reward for reward in response.groups[0].rewards] == [0.93]


def test_a_client_is_closed_at_the_end_of_its_block() -> None:
    async def run(url: str) -> None:
        async with AsyncClient(url) as client:
            await client.info()
            own = client._http
        assert own is not None
        assert own.is_closed
        # Outside of the block each call opens a connection of its own.
        assert (await client.info()).policy.model == "fake"
        assert vars(client)["_http"] is None

    with served() as url:
        asyncio.run(run(url))


def test_a_cancelled_call_ends_at_once() -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        has_begun.set()
        assert may_end.wait(WAIT_S)

    async def run(url: str) -> None:
        task = asyncio.create_task(AsyncClient(url).score(REQUEST))
        assert await asyncio.to_thread(has_begun.wait, WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not may_end.is_set()

    with served(FakePolicy(before_scoring=hold)) as url:
        try:
            asyncio.run(run(url))
        finally:
            may_end.set()
