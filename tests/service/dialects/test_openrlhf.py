"""OpenRLHF's remote reward."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from shopr1_service.policy.fake import CharacterCodec, FakePolicy
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
    AIOHTTP,
    LOG_KEYS,
    MAX_TOKENS,
    OPENRLHF,
    TOO_LONG,
    body,
    openrlhf,
    register,
    send,
    send_ok,
)

pytestmark = pytest.mark.anyio

HALF_PAIR = "\ud83d"
SIBLING = {"type": "click", "name": "add_to_cart.buy_later"}


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running(FakePolicy(26.0, max_sequence_tokens=MAX_TOKENS)) as client:
        yield client


# --- responses -------------------------------------------------------------------------------------


async def test_its_request_byte_for_byte(service: httpx.AsyncClient) -> None:
    sent = (
        b'{"query": ["<|user|>\\nBuy \\u00e9?{\\"rationale\\": \\"abcd\\", \\"action\\": {\\"type\\": '
        b'\\"click\\", \\"name\\": \\"add_to_cart.buy_now\\"}}<end>"], "prompts": ["<|user|>\\nBuy '
        b'\\u00e9?"], "labels": ["{\\"type\\": \\"click\\", \\"name\\": \\"add_to_cart.buy_now\\"}"]}'
    )
    response = await service.post(OPENRLHF, content=sent, headers=AIOHTTP)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/json"
    # 0.5 + 0.3 + 0.2 + 1000 · 1 + 0.005 · 26; one rollout's logs are numbers, which it makes tensors of.
    assert response.json() == {
        "rewards": [1001.13],
        "scores": [1.0],
        "extra_logs": {
            "shopr1/format": 0.5,
            "shopr1/action_type": 0.3,
            "shopr1/attribute": 0.2,
            "shopr1/value": 1000.0,
            "shopr1/self_certainty": 0.13,
            "shopr1/self_certainty_nats": 26.0,
            "shopr1/has_self_certainty": 1.0,
            "shopr1/format_ok": 1.0,
            "shopr1/type_match": 1.0,
            "shopr1/exact_match": 1.0,
            "shopr1/num_rationale_tokens": 4.0,
            "shopr1/unscorable": 0.0,
        },
    }


async def test_no_rollouts(service: httpx.AsyncClient) -> None:
    answered = await send_ok(service, OPENRLHF, b'{"query": [], "prompts": [], "labels": []}')
    assert answered == {"rewards": [], "scores": [], "extra_logs": {key: [] for key in LOG_KEYS}}


MANY = [
    ("page a", answer(CLICK, "because"), json.dumps(CLICK)),
    ("page b", answer(TERMINATE), TERMINATE),
    ("page a", answer(SIBLING, "it is there"), json.dumps(CLICK)),
    ("page a", "nonsense", CLICK),
    ("page b", answer(CLICK), {"ground_truth": SEARCH}),
    ("page a", answer(rationale=""), CLICK),
]


async def test_many_rollouts_in_order() -> None:
    async with running(FakePolicy(10.0, 0.5)) as client:
        answered = await send_ok(client, OPENRLHF, openrlhf(*MANY))
        alone = [await send_ok(client, OPENRLHF, openrlhf(rollout)) for rollout in MANY]
    assert answered["rewards"] == [reward for one in alone for reward in one["rewards"]]
    assert answered["scores"] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert list(answered["extra_logs"]) == LOG_KEYS
    for key, values in answered["extra_logs"].items():
        assert values == [one["extra_logs"][key] for one in alone]
    assert answered["extra_logs"]["shopr1/format_ok"] == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert answered["extra_logs"]["shopr1/type_match"] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    # Nonsense is not measured, and an empty rationale has nothing to measure: no certainty, not one of 0.
    assert answered["extra_logs"]["shopr1/has_self_certainty"] == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]


async def test_the_rewards_are_those_of_score() -> None:
    async with running(FakePolicy(10.0, 0.5)) as client:
        answered = await send_ok(client, OPENRLHF, openrlhf(*MANY))
        groups = [
            group(MANY[0][1], MANY[2][1], MANY[3][1], MANY[5][1], truth=CLICK, prompt="page a"),
            group(MANY[1][1], truth=TERMINATE, prompt="page b"),
            group(MANY[4][1], truth=SEARCH, prompt="page b"),
        ]
        scored = (await score(client, *groups))["groups"]
    by_order = [scored[0], scored[1], scored[0], scored[0], scored[2], scored[0]]
    places = [0, 0, 1, 2, 0, 3]
    expected = [each["rewards"][place] for each, place in zip(by_order, places, strict=True)]
    assert answered["rewards"] == [reward["reward"] for reward in expected]
    for term in ("format", "action_type", "attribute", "value", "self_certainty"):
        assert answered["extra_logs"][f"shopr1/{term}"] == [each["components"][term] for each in expected]
    nats = [each["details"]["self_certainty_nats"] for each in expected]
    assert nats[3] is None
    assert answered["extra_logs"]["shopr1/self_certainty_nats"] == [each or 0.0 for each in nats]


async def test_a_prompt_is_computed_once_for_its_rollouts() -> None:
    async with running() as client:
        await send_ok(client, OPENRLHF, openrlhf(*MANY))
        # (page a, CLICK), (page b, TERMINATE) and (page b, SEARCH) are a group each.
        assert await metric(client, "shopr1_phase_duration_seconds_count", phase="queue") == 3
        assert await metric(client, "shopr1_phase_duration_seconds_count", phase="prepare") == 1


@pytest.mark.parametrize("end", ["", "<end>", "<end>\n", "<end><end>", " <end> "])
async def test_end_tokens_do_not_count(end: str) -> None:
    async with running(FakePolicy(10.0, 0.5)) as client:
        answered = await send_ok(client, OPENRLHF, openrlhf(("page<end>", answer() + end, TERMINATE)))
    # The rationale's characters are 15 … 18 of the completion, whose mean certainty is 10 + 16.5/2.
    assert answered["extra_logs"]["shopr1/self_certainty_nats"] == 18.25
    assert answered["rewards"] == [0.5 + 0.3 + 0.0 + 0.0 + 0.005 * 18.25]


async def test_texts_with_ids_beyond_the_embedding_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CharacterCodec, "num_ids", 128)
    long = answer(rationale="é")
    sent = openrlhf(("page", answer(), TERMINATE), ("é", answer(), TERMINATE), ("page", long, TERMINATE))
    async with running() as client:
        refused = problem(await send(client, OPENRLHF, sent), 422, "invalid_request")
    assert sorted(error["location"] for error in refused["errors"]) == ["prompts[1]", "query[2]"]
    assert all("contains 'é', token id 233" in error["message"] for error in refused["errors"])


@pytest.mark.parametrize("padding", ["<end>", "<end>" * 40, "<end><end> ", "<end> <end> "])
async def test_padding_before_the_prompt_does_not_count(padding: str) -> None:
    """Releases up to 0.6 decode the rows of a padded batch."""
    async with running(FakePolicy(10.0, 0.5)) as client:
        sent = openrlhf(("page", answer() + "<end>", TERMINATE), ("<end>page", answer(), TERMINATE))
        expected = await send_ok(client, OPENRLHF, sent)
        padded = {**sent, "query": [padding + query for query in sent["query"]]}
        assert await send_ok(client, OPENRLHF, padded) == expected


@pytest.mark.parametrize("before", ["x", " ", "<s>", "<end>x", "<end><s>", "<en"])
async def test_more_than_padding_before_the_prompt_is_refused(
    service: httpx.AsyncClient, before: str
) -> None:
    sent = openrlhf(("page", answer(), TERMINATE), ("page", answer(), TERMINATE))
    sent["query"][1] = before + sent["query"][1]
    refused = problem(await send(service, OPENRLHF, sent), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == ["query[1]"]


async def test_the_prompt_is_cut_once_only() -> None:
    async with running() as client:
        repeated = await send_ok(client, OPENRLHF, openrlhf(("page", "page" + answer(), TERMINATE)))
        prompt_in_it = await send_ok(
            client, OPENRLHF, openrlhf(("page", answer(rationale="page"), TERMINATE))
        )
    assert repeated["extra_logs"]["shopr1/format_ok"] == 0.0
    assert prompt_in_it["extra_logs"]["shopr1/num_rationale_tokens"] == 4.0


async def test_half_a_surrogate_pair_is_the_policys_mistake(service: httpx.AsyncClient) -> None:
    answered = await send_ok(service, OPENRLHF, openrlhf(("page", answer(rationale=HALF_PAIR), TERMINATE)))
    assert answered["rewards"] == [0.0]
    assert answered["extra_logs"]["shopr1/format_ok"] == 0.0


async def test_unknown_fields_are_ignored(service: httpx.AsyncClient) -> None:
    sent = openrlhf(("page", answer(), TERMINATE)) | {"images": [None], "step": 3}
    assert (await send_ok(service, OPENRLHF, sent))["rewards"] == [0.93]


def test_a_burst_of_single_rollouts_over_a_socket() -> None:
    """Each with a connection of its own, as OpenRLHF sends them."""
    sent = [openrlhf(("page", answer(rationale="x" * (i + 1)), TERMINATE)) for i in range(12)]

    async def burst(url: str) -> list[httpx.Response]:
        async def one(value: Any) -> httpx.Response:
            async with httpx.AsyncClient(timeout=180) as client:
                return await client.post(url + OPENRLHF, content=body(value), headers=AIOHTTP)

        return await asyncio.gather(*map(one, sent))

    with served(FakePolicy(10.0, 0.5)) as url:
        responses = asyncio.run(burst(url))
    assert [response.headers["Content-Type"] for response in responses] == ["application/json"] * 12
    # The mean over characters 15 … 15 + i is 10 + (15 + i/2)/2.
    assert [response.json()["rewards"] for response in responses] == [
        [0.5 + 0.3 + 0.0 + 0.0 + 0.005 * (10 + (15 + i / 2) / 2)] for i in range(12)
    ]


# --- rejections -------------------------------------------------------------------------------------


WRONG: list[tuple[Any, list[str]]] = [
    ({}, ["query", "prompts", "labels"]),
    ([], ["body"]),
    ({"query": "page", "prompts": [], "labels": []}, ["query"]),
    ({"query": [1], "prompts": ["page"], "labels": [""]}, ["query[0]"]),
    ({"query": ["page"], "prompts": [None], "labels": [""]}, ["prompts[0]"]),
    ({"query": [HALF_PAIR], "prompts": [HALF_PAIR], "labels": [TERMINATE]}, ["prompts[0]"]),
    ({"query": ["page"], "prompts": ["page"], "labels": {}}, ["labels"]),
    ({"query": ["page"], "prompts": ["page", "page"], "labels": []}, ["prompts", "labels"]),
    ({"query": [], "prompts": ["page"], "labels": []}, ["prompts"]),
    ({"query": ["page", "pag"], "prompts": ["page", "page"], "labels": [TERMINATE] * 2}, ["query[1]"]),
    (openrlhf(("page", "", 5), ("page", "", ""), ("page", "", TERMINATE)), ["labels[0]", "labels[1]"]),
]


@pytest.mark.parametrize(("sent", "locations"), WRONG)
async def test_bad_fields_are_named(service: httpx.AsyncClient, sent: Any, locations: list[str]) -> None:
    before = await metric(service, "shopr1_rollouts_total")
    refused = problem(await send(service, OPENRLHF, sent), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == locations
    assert all(error["message"] for error in refused["errors"])
    assert await metric(service, "shopr1_rollouts_total") == before


# --- unscorable rollouts ----------------------------------------------------------------------------

UNSCORABLE = openrlhf(
    ("page", answer(), TERMINATE), ("page", TOO_LONG, TERMINATE), ("b", TOO_LONG, TERMINATE)
)


async def test_unscorable_is_an_error_by_default(service: httpx.AsyncClient) -> None:
    refused = problem(await send(service, OPENRLHF, UNSCORABLE), 422, "unscorable")
    assert [error["location"] for error in refused["errors"]] == ["query[1]", "query[2]"]
    assert all(error["message"].startswith("sequence_too_long: ") for error in refused["errors"])
    assert refused["detail"].startswith("query[1]: sequence_too_long: ")
    assert refused["detail"].endswith("; and 1 more")
    assert await metric(service, "shopr1_fallback_rewards_total") == 0
    assert 'shopr1_fallback_rewards_total{dialect="openrlhf",reason="sequence_too_long"} 0.0' in (
        (await service.get("/metrics")).text
    )


@pytest.mark.parametrize("number", [0.0, -1.5])
async def test_unscorable_is_the_operators_number(number: float) -> None:
    policy = FakePolicy(26.0, max_sequence_tokens=MAX_TOKENS)
    async with running(policy, openrlhf_unscorable=number) as client:
        answered = await send_ok(client, OPENRLHF, UNSCORABLE)
        one = await send_ok(client, OPENRLHF, openrlhf(("page", TOO_LONG, TERMINATE)))
        labels = {"dialect": "openrlhf", "reason": "sequence_too_long"}
        count = await metric(client, "shopr1_fallback_rewards_total", **labels)
    assert answered["rewards"] == [0.93, number, number]
    assert answered["scores"] == [1.0, 1.0, 1.0]  # the rules know the action without the policy
    assert answered["extra_logs"]["shopr1/unscorable"] == [0.0, 1.0, 1.0]
    assert answered["extra_logs"]["shopr1/has_self_certainty"] == [1.0, 0.0, 0.0]
    assert one["rewards"] == [number]
    assert one["extra_logs"]["shopr1/unscorable"] == 1
    assert list(one["extra_logs"]) == list(answered["extra_logs"]) == LOG_KEYS
    assert count == 3


async def test_labels_that_are_missing_come_from_the_table() -> None:
    async with running() as client:
        await register(client, ("page", CLICK), ("page b", TERMINATE))
        sent = openrlhf(
            ("page", answer(CLICK), ""), ("page b", answer(), None), ("page", answer(), TERMINATE)
        )
        answered = await send_ok(client, OPENRLHF, sent)
    assert answered["scores"] == [1.0, 1.0, 1.0]
