"""LLaMA-Factory's reward API."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from shopr1_service.policy.fake import FakePolicy
from tests.support.http import (
    CLICK,
    SEARCH,
    TERMINATE,
    answer,
    group,
    metric,
    problem,
    running,
    score,
    served,
)
from tests.support.trainer_requests import (
    LLAMA_FACTORY,
    MAX_TOKENS,
    REQUESTS,
    TOO_LONG,
    body,
    llama_factory,
    register,
    send,
    send_ok,
)

pytestmark = pytest.mark.anyio

HALF_PAIR = "\ud83d"


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running(FakePolicy(26.0, max_sequence_tokens=MAX_TOKENS)) as client:
        await register(client, ("page", TERMINATE), ("page two", CLICK), ("é", SEARCH))
        yield client


async def test_its_request_byte_for_byte(service: httpx.AsyncClient) -> None:
    sent = (
        b'{"model": "model", "messages": ["page{\\"rationale\\": \\"abcd\\", \\"action\\": {\\"type\\": '
        b'\\"terminate\\"}}<end>"]}'
    )
    response = await service.post(LLAMA_FACTORY, content=sent, headers=REQUESTS)
    answered = json.loads(response.text)  # as it reads it, whatever the status
    assert answered == {
        "id": f"scoreval-{response.headers['X-Request-ID']}",
        "object": "score.evaluation",
        "model": "model",
        "scores": [0.93],
    }


async def test_no_texts(service: httpx.AsyncClient) -> None:
    assert (await send_ok(service, LLAMA_FACTORY, llama_factory()))["scores"] == []


async def test_many_texts_in_order_and_with_the_rewards_of_score() -> None:
    completions = [answer(CLICK, "because"), answer(TERMINATE), "nonsense", answer(SEARCH), answer(CLICK)]
    prompts = ["page two", "page", "page two", "é", "page two"]
    async with running(FakePolicy(10.0, 0.5)) as client:
        await register(client, ("page", TERMINATE), ("page two", CLICK), ("é", SEARCH))
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        answered = await send_ok(client, LLAMA_FACTORY, llama_factory(*texts))
        scored = await score(
            client,
            group(completions[0], completions[2], completions[4], truth=CLICK, prompt="page two"),
            group(completions[1], truth=TERMINATE, prompt="page"),
            group(completions[3], truth=SEARCH, prompt="é"),
        )
    first, second, third = ([r["reward"] for r in each["rewards"]] for each in scored["groups"])
    assert answered["scores"] == [first[0], second[0], first[1], third[0], first[2]]
    assert len(set(answered["scores"])) == 5


async def test_the_longest_registered_prompt_is_taken(service: httpx.AsyncClient) -> None:
    texts = ["page two" + answer(CLICK), "page" + answer(), "page tw" + answer()]
    answered = await send_ok(service, LLAMA_FACTORY, llama_factory(*texts))
    # " tw" precedes the object of the last one: with the prompt "page" that is a format error.
    assert answered["scores"] == [1001.13, 0.93, 0.0]


async def test_half_a_surrogate_pair_is_the_policys_mistake(service: httpx.AsyncClient) -> None:
    answered = await send_ok(service, LLAMA_FACTORY, llama_factory("é" + answer(rationale=HALF_PAIR)))
    assert answered["scores"] == [0.0]


async def test_a_newer_ground_truth_takes_the_place_of_the_old() -> None:
    async with running(FakePolicy(26.0)) as client:
        assert await register(client, ("page", CLICK)) == 1
        before = await send_ok(client, LLAMA_FACTORY, llama_factory("page" + answer()))
        assert await register(client, ("page", TERMINATE)) == 1
        after = await send_ok(client, LLAMA_FACTORY, llama_factory("page" + answer()))
    # The wrong type keeps the format and the certainty.
    assert (before["scores"], after["scores"]) == ([0.63], [0.93])


async def test_texts_without_a_registered_prompt_are_named(service: httpx.AsyncClient) -> None:
    sent = llama_factory("pag" + answer(), "page" + answer(), "", "Page" + answer())
    refused = problem(await send(service, LLAMA_FACTORY, sent), 422, "invalid_request")
    assert [e["location"] for e in refused["errors"]] == ["messages[0]", "messages[2]", "messages[3]"]
    # Its client reads the body whatever the status: this key must not be there.
    assert "scores" not in refused


WRONG: list[tuple[Any, list[str]]] = [
    ({}, ["model", "messages"]),
    ({"model": 1, "messages": []}, ["model"]),
    ({"model": "model", "messages": "page"}, ["messages"]),
    ({"model": "model", "messages": ["page", {"role": "user"}]}, ["messages[1]"]),
]


@pytest.mark.parametrize(("sent", "locations"), WRONG)
async def test_bad_fields_are_named(service: httpx.AsyncClient, sent: Any, locations: list[str]) -> None:
    refused = problem(await send(service, LLAMA_FACTORY, sent), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == locations


async def test_its_own_servers_parameters_do_no_harm(service: httpx.AsyncClient) -> None:
    sent = llama_factory("page" + answer()) | {"max_length": 10}
    assert (await send_ok(service, LLAMA_FACTORY, sent))["scores"] == [0.93]


async def test_unscorable_is_an_error_by_default(service: httpx.AsyncClient) -> None:
    sent = llama_factory("page" + answer(), "page" + TOO_LONG)
    refused = problem(await send(service, LLAMA_FACTORY, sent), 422, "unscorable")
    assert [error["location"] for error in refused["errors"]] == ["messages[1]"]


async def test_unscorable_is_the_operators_number() -> None:
    policy = FakePolicy(26.0, max_sequence_tokens=MAX_TOKENS)
    async with running(policy, llama_factory_unscorable=-1.0) as client:
        await register(client, ("page", TERMINATE))
        sent = llama_factory("page" + TOO_LONG, "page" + answer())
        answered = await send_ok(client, LLAMA_FACTORY, sent)
        count = await metric(client, "shopr1_fallback_rewards_total", dialect="llama_factory")
    assert answered["scores"] == [-1.0, 0.93]
    assert count == 1


def test_over_a_socket() -> None:
    with served(FakePolicy(26.0)) as url, httpx.Client(headers=REQUESTS) as client:
        entry = {"prompt": "page", "ground_truth": TERMINATE}
        assert client.put(f"{url}/labels", json={"labels": [entry]}).json() == {"num_labels": 1}
        sent = body(llama_factory("page" + answer()))
        assert client.post(url + LLAMA_FACTORY, content=sent).json()["scores"] == [0.93]
