"""The label table over HTTP, and what a label may look like."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.http import (
    CLICK,
    SEARCH,
    TERMINATE,
    answer,
    client_of,
    problem,
    running,
    write_recipe,
)
from tests.support.labels import FORMS, WRONG
from tests.support.trainer_requests import SLIME, register, send, send_ok, slime

pytestmark = pytest.mark.anyio

# Each of these means CLICK.
# The error and its position in the label.


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running(FakePolicy(26.0)) as client:
        yield client


@pytest.mark.parametrize("label", FORMS.values(), ids=FORMS)
async def test_forms_of_a_registered_ground_truth(label: Any) -> None:
    async with running(FakePolicy(26.0)) as client:
        assert await register(client, ("page", label)) == 1
        assert await send_ok(client, SLIME, slime(response=answer(CLICK), label=None)) == 1001.13


@pytest.mark.parametrize(("label", "path"), WRONG.values(), ids=WRONG)
async def test_invalid_registered_ground_truths(service: httpx.AsyncClient, label: Any, path: str) -> None:
    held = (await service.get("/labels")).json()
    entries = [{"prompt": "a", "ground_truth": TERMINATE}, {"prompt": "b", "ground_truth": label}]
    # Not by httpx, which does not send half a surrogate pair as an escape.
    sent = json.dumps({"labels": entries})
    response = await service.put("/labels", content=sent, headers={"Content-Type": "application/json"})
    refused = problem(response, 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == [f"labels[1].ground_truth{path}"]
    assert (await service.get("/labels")).json() == held


# --- the table --------------------------------------------------------------------------------------


async def test_put_get_delete() -> None:
    chat = [{"role": "user", "content": "page"}]
    async with running() as client:
        assert (await client.get("/labels")).json() == {"num_labels": 0}
        assert await register(client, ("page", CLICK), (chat, CLICK), ("page", CLICK)) == 2
        assert await register(client, ("page", TERMINATE), ("other", TERMINATE)) == 3
        assert await register(client) == 3
        assert (await client.get("/labels")).json() == {"num_labels": 3}
        assert (await client.delete("/labels")).json() == {"num_labels": 0}
        assert (await client.get("/labels")).json() == {"num_labels": 0}
        refused = problem(await send(client, SLIME, slime(label=None)), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == ["label"]


CHAT = [{"role": "user", "content": "twice"}]


@pytest.mark.parametrize("prompt", ["twice", CHAT])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (CLICK, TERMINATE),
        (CLICK, CLICK | {"name": "add_to_cart.buy_later"}),
        (json.dumps(CLICK), {"ground_truth": SEARCH}),
    ],
)
async def test_two_truths_of_one_prompt_are_refused(
    service: httpx.AsyncClient, prompt: Any, first: Any, second: Any
) -> None:
    await service.delete("/labels")
    labels = [("other", CLICK), (prompt, first), ("one more", CLICK), (prompt, second)]
    sent = {"labels": [{"prompt": prompt, "ground_truth": truth} for prompt, truth in labels]}
    refused = problem(await service.put("/labels", json=sent), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == [
        "labels[1].ground_truth",
        "labels[3].ground_truth",
    ]
    messages = [error["message"] for error in refused["errors"]]
    assert "contradicts labels[3], which has the same prompt" in messages[0]
    assert "contradicts labels[1], which has the same prompt" in messages[1]
    assert '"click"' in messages[0]
    assert messages[0] != messages[1]
    assert (await service.get("/labels")).json() == {"num_labels": 0}


async def test_two_recipes_for_one_prompt_are_refused(tmp_path: Path) -> None:
    async with running(FakePolicy(26.0), recipe=write_recipe(tmp_path)) as client:
        named = {"ground_truth": CLICK, "recipe": "shop_r1"}
        entries = [{"prompt": "page", "ground_truth": truth} for truth in (named, CLICK)]
        refused = problem(await client.put("/labels", json={"labels": entries}), 422, "invalid_request")
    assert "(recipe 'shop_r1') contradicts labels[1]" in refused["errors"][0]["message"]
    assert "(recipe 'mine') contradicts labels[0]" in refused["errors"][1]["message"]


async def test_the_same_truth_twice_is_no_contradiction(service: httpx.AsyncClient) -> None:
    await register(service, ("twice", CLICK), ("twice", json.dumps(CLICK)), ("twice", {**CLICK, "url": "x"}))
    assert await send_ok(service, SLIME, slime("twice", answer(CLICK), label=None)) == 1001.13


async def test_a_later_request_replaces_a_label_with_a_warning(
    service: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    await service.delete("/labels")
    await register(service, ("twice", CLICK), ("same", CLICK))
    assert not caplog.records
    await register(service, ("twice", TERMINATE), ("same", CLICK), ("new", CLICK))
    assert [record.getMessage() for record in caplog.records] == [
        "1 prompts that had a label before now have a different one"
    ]
    assert await send_ok(service, SLIME, slime("twice", label=None)) == 0.93


async def test_a_label_that_could_not_be_earned_is_refused(service: httpx.AsyncClient) -> None:
    sent = {"labels": [{"prompt": "page", "ground_truth": {"type": "click", "name": ""}}]}
    refused = problem(await service.put("/labels", json=sent), 422, "invalid_request")
    [error] = refused["errors"]
    assert error["location"] == "labels[0].ground_truth.name"
    assert "'name' of a 'click' action is empty" in error["message"]


async def test_the_table_is_bounded_and_takes_all_or_none() -> None:
    def entries(*prompts: str) -> Any:
        return {"labels": [{"prompt": prompt, "ground_truth": TERMINATE} for prompt in prompts]}

    async with running(max_labels=2) as client:
        await register(client, ("a", CLICK))
        refused = problem(await client.put("/labels", json=entries("b", "c")), 413, "too_large")
        assert (await client.get("/labels")).json() == {"num_labels": 1}
        assert (await client.put("/labels", json=entries("b", "b", "a"))).json() == {"num_labels": 2}
        assert (await client.put("/labels", json=entries("a", "b"))).json() == {"num_labels": 2}
    assert "3 labels, max_labels = 2" in refused["detail"]


async def test_labels_can_be_registered_while_the_policy_loads() -> None:
    """A trainer's set-up need not wait."""
    async with client_of(create_app(Settings(), LocalEngine.opener(FakePolicy))) as client:
        assert await register(client, ("page", TERMINATE)) == 1


ENTRY = {"prompt": "page", "ground_truth": TERMINATE}
WRONG_BODIES: list[tuple[Any, list[str]]] = [
    ({}, ["labels"]),
    ({"labels": {}}, ["labels"]),
    ({"labels": [], "policy": "x"}, ["policy"]),
    ({"labels": [ENTRY, {}]}, ["labels[1].prompt", "labels[1].ground_truth"]),
    ({"labels": [ENTRY | {"recipe": "shop_r1"}]}, ["labels[0].recipe"]),
    ({"labels": [ENTRY | {"prompt": ""}]}, ["labels[0].prompt"]),
    ({"labels": [ENTRY | {"prompt": []}]}, ["labels[0].prompt"]),
    ({"labels": [ENTRY | {"prompt": {"token_ids": [1]}}]}, ["labels[0].prompt"]),
    ({"labels": [ENTRY | {"prompt": [{"role": "user", "content": 1}]}]}, ["labels[0].prompt[0].content"]),
    ({"labels": [ENTRY | {"ground_truth": ""}]}, ["labels[0].ground_truth"]),
]


@pytest.mark.parametrize(("sent", "locations"), WRONG_BODIES)
async def test_bad_fields_are_named(service: httpx.AsyncClient, sent: Any, locations: list[str]) -> None:
    refused = problem(await service.put("/labels", json=sent), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == locations
