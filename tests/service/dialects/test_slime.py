"""slime's remote reward."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from shopr1_service.core import CodecError
from shopr1_service.policy.fake import CharacterCodec, FakePolicy
from tests.support.http import CLICK, TERMINATE, answer, group, metric, problem, running, score, served
from tests.support.trainer_requests import (
    AIOHTTP,
    LOG_KEYS,
    MAX_TOKENS,
    SLIME,
    TOO_LONG,
    body,
    register,
    send,
    send_ok,
    slime,
)

pytestmark = pytest.mark.anyio

CHAT = [{"role": "system", "content": "Shop."}, {"role": "user", "content": "page"}]


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running(FakePolicy(26.0, max_sequence_tokens=MAX_TOKENS)) as client:
        yield client


async def test_its_request_byte_for_byte(service: httpx.AsyncClient) -> None:
    sent = (
        b'{"prompt": "page", "response": "{\\"rationale\\": \\"abcd\\", \\"action\\": {\\"type\\": '
        b'\\"terminate\\"}}<end>", "label": "{\\"type\\": \\"terminate\\"}"}'
    )
    response = await service.post(SLIME, content=sent, headers=AIOHTTP)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/json"
    assert response.content == b"0.93"  # 0.5 + 0.3 + 0.005 · 26: the body itself is the reward


async def test_a_reward_of_0_is_a_number_too(service: httpx.AsyncClient) -> None:
    response = await send(service, SLIME, slime(response="nonsense"))
    assert response.content == b"0.0"


@pytest.mark.parametrize("flag", ["true", "1"])
async def test_an_object_on_demand(service: httpx.AsyncClient, flag: str) -> None:
    answered = await send_ok(service, SLIME, slime(response=answer(CLICK), label=CLICK), object=flag)
    assert list(answered) == ["reward", *LOG_KEYS]
    assert answered["reward"] == 1001.13
    assert answered["shopr1/value"] == 1000.0
    assert sum(answered[key] for key in LOG_KEYS[:5]) == answered["reward"]


async def test_chat_messages_go_through_the_template() -> None:
    async with running(FakePolicy(10.0, 0.5)) as client:
        answered = await send_ok(client, SLIME, slime(prompt=CHAT, response=answer(CLICK), label=CLICK))
        scored = await score(client, group(answer(CLICK), truth=CLICK, prompt=CHAT))
        tokens = await metric(client, "shopr1_engine_tokens_total")
    assert answered == scored["groups"][0]["rewards"][0]["reward"]
    # Both went as "system: Shop.\nuser: page\n" and the completion.
    assert tokens == 2 * (len("system: Shop.\nuser: page\n") + len(answer(CLICK)))


async def test_a_chat_that_ends_with_the_assistants_message_is_closed_as_by_slime() -> None:
    chat = [*CHAT, {"role": "assistant", "content": "Sure"}]
    async with running(FakePolicy(10.0, 0.5)) as client:
        await send_ok(client, SLIME, slime(prompt=chat, response=answer(CLICK), label=CLICK))
        tokens = await metric(client, "shopr1_engine_tokens_total")
    assert tokens == len("system: Shop.\nuser: page\nassistant: Sure\n") + len(answer(CLICK))


async def test_messages_that_the_template_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> list[int]:
        raise CodecError("no system role")

    monkeypatch.setattr(CharacterCodec, "encode_chat", refuse)
    async with running() as client:
        refused = problem(await send(client, SLIME, slime(prompt=CHAT)), 422, "invalid_request")
    assert refused["errors"] == [{"location": "prompt", "message": "no system role"}]


@pytest.mark.parametrize(
    "sent", [slime(label=None), slime(label=""), {"prompt": "page", "response": answer()}]
)
async def test_a_missing_label_is_read_from_the_table(sent: Any) -> None:
    async with running() as client:
        refused = problem(await send(client, SLIME, sent), 422, "invalid_request")
        assert [error["location"] for error in refused["errors"]] == ["label"]
        await register(client, ("page", TERMINATE), (CHAT, CLICK))
        assert await send_ok(client, SLIME, sent) == 0.93
        # Messages have a label of their own.
        assert await send_ok(client, SLIME, sent | {"prompt": CHAT, "response": answer(CLICK)}) == 1001.13


WRONG: list[tuple[Any, list[str]]] = [
    ({}, ["prompt", "response"]),
    (slime(prompt=None), ["prompt"]),
    (slime(prompt={"token_ids": [1]}), ["prompt"]),
    (slime(prompt="\ud83d"), ["prompt"]),
    (slime(prompt=[{"role": "user"}]), ["prompt[0].content"]),
    # A template may make something of it: it must not be dropped.
    (slime(prompt=[{"role": "user", "content": "x", "tool_calls": []}]), ["prompt[0].tool_calls"]),
    (slime() | {"response": None}, ["response"]),
    (slime() | {"response": ["x"]}, ["response"]),
    (slime(label=7), ["label"]),
    (slime(label=[TERMINATE]), ["label"]),
]


@pytest.mark.parametrize(("sent", "locations"), WRONG)
async def test_bad_fields_are_named(service: httpx.AsyncClient, sent: Any, locations: list[str]) -> None:
    refused = problem(await send(service, SLIME, sent), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == locations


async def test_a_flag_that_is_none(service: httpx.AsyncClient) -> None:
    refused = problem(await send(service, SLIME, slime(), object="perhaps"), 422, "invalid_request")
    assert len(refused["errors"]) == 1


async def test_unscorable_is_an_error_by_default(service: httpx.AsyncClient) -> None:
    refused = problem(await send(service, SLIME, slime(response=TOO_LONG)), 422, "unscorable")
    assert [error["location"] for error in refused["errors"]] == ["response"]
    assert "sequence_too_long" in refused["detail"]


async def test_unscorable_is_the_operators_number() -> None:
    policy = FakePolicy(max_sequence_tokens=MAX_TOKENS)
    async with running(policy, slime_unscorable=0.25) as client:
        number = await send_ok(client, SLIME, slime(response=TOO_LONG))
        answered = await send_ok(client, SLIME, slime(response=TOO_LONG), object="true")
        count = await metric(client, "shopr1_fallback_rewards_total", dialect="slime")
    assert number == answered["reward"] == 0.25
    assert answered["shopr1/unscorable"] == 1
    assert list(answered) == ["reward", *LOG_KEYS]
    assert count == 2


def test_over_a_socket_with_one_session() -> None:
    """As slime's shared session sends them: one after the other on a connection that is kept."""
    with served(FakePolicy(26.0)) as url, httpx.Client(timeout=120, headers=AIOHTTP) as session:
        responses = [
            session.post(url + SLIME, content=body(slime(response=answer(action), label=CLICK)))
            for action in (CLICK, TERMINATE)
        ]
    assert [response.json() for response in responses] == [1001.13, 0.63]
