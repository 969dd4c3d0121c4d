"""The label table over HTTP, and what a label may look like."""

import json
from collections.abc import AsyncIterator
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
        assert await register(client, ("page", CLICK), (chat, CLICK), ("page", SEARCH)) == 2
        assert await register(client, ("page", TERMINATE), ("other", TERMINATE)) == 3
        assert await register(client) == 3
        assert (await client.get("/labels")).json() == {"num_labels": 3}
        assert (await client.delete("/labels")).json() == {"num_labels": 0}
        assert (await client.get("/labels")).json() == {"num_labels": 0}
        refused = problem(await send(client, SLIME, slime(label=None)), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == ["label"]


async def test_the_last_of_a_request_counts(service: httpx.AsyncClient) -> None:
    await register(service, ("twice", CLICK), ("twice", TERMINATE))
    assert await send_ok(service, SLIME, slime("twice", label=None)) == 0.93


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
