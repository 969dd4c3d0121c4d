"""Memory that clients make the service keep: bounded in bytes, refused beyond, and free in the end."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shopr1_service.memory.budget import Account
from tests.support.held import Held
from tests.support.http import (
    TERMINATE,
    WAIT_S,
    answer,
    group,
    metric,
    post,
    problem,
    running,
    served,
)

pytestmark = pytest.mark.anyio

_POLL_S = 0.01
HEADERS = {"Content-Type": "application/json"}


async def used(client: httpx.AsyncClient, account: Account) -> float:
    return await metric(client, "shopr1_client_memory_bytes", account=account.value)


async def until_free(client: httpx.AsyncClient) -> None:
    """Wait until no request holds memory: work that the engine has started ends after its client has gone."""
    for _ in range(int(WAIT_S / _POLL_S)):
        if not await used(client, Account.REQUESTS):
            return
        await asyncio.sleep(_POLL_S)
    raise AssertionError("requests still hold memory")


def body(prompt: str, num_chars: int = 0) -> dict[str, Any]:
    return {"groups": [group(answer(), prompt=prompt + "a" * num_chars)]}


async def test_large_bodies_that_wait_are_refused_until_there_is_room() -> None:
    """Each is far below every other limit, and the engine has not begun with any but the first."""
    policy = Held()
    async with running(policy, max_client_memory_bytes=8 * 2**20) as client:
        tasks = [asyncio.create_task(post(client, body(f"{i} ", 100_000))) for i in range(12)]
        done, waiting = await asyncio.wait(tasks, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        policy.gate.set()
        answers = [await task for task in tasks]
        refused = [each for each in answers if each.status_code != 200]
        assert done
        assert waiting
        for each in refused:
            detail = problem(each, 429, "overloaded")["detail"]
            assert "max_client_memory_bytes = 8388608" in detail
            assert int(each.headers["Retry-After"]) >= 1
        assert 0 < len(refused) < 12
        assert await metric(client, "shopr1_rejected_requests_total", reason="memory") == len(refused)
        assert (await post(client, body("again ", 100_000))).status_code == 200
        await until_free(client)


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_that_never_fits_is_too_large(is_chunked: bool) -> None:
    async def chunks(content: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(content), 1000):
            yield content[start : start + 1000]

    async with running(max_client_memory_bytes=100_000) as client:
        content = json.dumps(body("page", 60_000)).encode()
        sent = chunks(content) if is_chunked else content
        refused = problem(await client.post("/score", content=sent, headers=HEADERS), 413, "too_large")
        assert "max_client_memory_bytes = 100000" in refused["detail"]
        assert await used(client, Account.REQUESTS) == 0
        assert (await post(client, body("page"))).status_code == 200


async def test_tokens_and_answers_count_and_not_only_bodies() -> None:
    """A token takes forty times its bytes in the body."""
    async with running(max_client_memory_bytes=2**20) as client:
        many = {"groups": [group(*[answer(rationale="b" * 100)] * 100)]}
        assert len(json.dumps(many)) < 20_000
        problem(await post(client, many), 413, "too_large")
        await until_free(client)


async def test_kept_answers_make_room() -> None:
    async with running(max_client_memory_bytes=2_000_000) as client:
        for i in range(6):
            assert (await post(client, body(f"page {i}"))).status_code == 200
        kept = await used(client, Account.ANSWERS)
        assert 0 < kept <= 2_000_000 / 8
        most = int((2_000_000 - kept / 2 - await used(client, Account.RUNS)) / 2)
        response = await client.post("/score", content=b" " * most, headers=HEADERS)
        assert response.status_code == 400  # it is no JSON, but there was room for it
        assert await used(client, Account.ANSWERS) < kept
        assert await metric(client, "shopr1_rejected_requests_total", reason="memory") == 0


async def test_labels_leave_room_for_requests() -> None:
    async with running(max_client_memory_bytes=400_000) as client:

        async def put(name: str) -> httpx.Response:
            labels = [{"prompt": f"{name} {i}", "ground_truth": TERMINATE} for i in range(100)]
            return await client.put("/labels", json={"labels": labels})

        answers = [await put(str(i)) for i in range(15)]
        problem(answers[-1], 413, "too_large")
        held = await used(client, Account.LABELS)
        assert 200_000 < held <= 300_000
        assert (await post(client, body("page"))).status_code == 200
        assert (await client.delete("/labels")).json() == {"num_labels": 0}
        assert await used(client, Account.LABELS) == 0
        assert (await put("again")).status_code == 200


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["score", "same", "invalid", "malformed", "large", "cancelled", "include", "labels", "cleared"]
        ),
        st.integers(0, 3000),
    ),
    min_size=1,
    max_size=25,
)


@given(steps=STEPS)
@settings(max_examples=12)
def test_any_requests_end_at_zero(steps: list[tuple[str, int]]) -> None:
    asyncio.run(_run(steps))


async def _run(steps: list[tuple[str, int]]) -> None:
    async with running(max_client_memory_bytes=600_000) as client:
        waiting = [asyncio.create_task(_step(client, *step, number)) for number, step in enumerate(steps)]
        assert {await task for task in waiting} <= {200, 400, 413, 422, 429, None}
        assert (await client.delete("/labels")).status_code == 200
        await until_free(client)
        for account in (Account.LABELS, Account.ADAPTERS, Account.ROLLOUT_LOG):
            assert await used(client, account) == 0
        assert await used(client, Account.ANSWERS) <= 600_000 / 8


async def _step(client: httpx.AsyncClient, what: str, size: int, number: int) -> int | None:
    """Send a request; its status, or None if it was cancelled."""
    sent: dict[str, Any] = body(f"{number} ", size)
    match what:
        case "same":
            sent = body("page")
        case "invalid":
            sent = {"groups": [{"prompt": "a" * size}]}
        case "malformed":
            return (await post(client, b"{" * size)).status_code
        case "large":
            sent = body(f"{number} ", 30 * size)
        case "include":
            sent["include"] = ["tokens", "token_ids"]
        case "labels":
            labels = [{"prompt": f"{number} {i}", "ground_truth": TERMINATE} for i in range(size // 10)]
            return (await client.put("/labels", json={"labels": labels})).status_code
        case "cleared":
            return (await client.delete("/labels")).status_code
    request = asyncio.create_task(post(client, sent))
    if what == "cancelled":
        for _ in range(size % 40):  # anywhere between its start and its answer
            await asyncio.sleep(0)
        request.cancel()
    try:
        return (await request).status_code
    except asyncio.CancelledError:
        return None


async def test_clients_that_disconnect_leave_nothing() -> None:
    policy = Held()
    with served(policy) as url:
        async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client:
            begun = asyncio.create_task(post(client, body("1 ", 1000)))
            await asyncio.to_thread(policy.has_begun.wait, WAIT_S)
            for i in range(5):
                with pytest.raises(httpx.ReadTimeout):
                    await client.post("/score", json=body(f"{i} ", 50_000), timeout=0.5)
            policy.gate.set()
            assert (await begun).status_code == 200
            await until_free(client)
