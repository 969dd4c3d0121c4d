"""Large bodies: the same answers as for small ones, bounded before they are read."""

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest

from shopr1_client.wire import ScoreResponse
from shopr1_service.http import json_body
from tests.support.http import TERMINATE, answer, group, post, problem, running, score

pytestmark = pytest.mark.anyio

PADDING = "x" * json_body.MAX_INLINE_BYTES


def large(*groups: Any) -> dict[str, Any]:
    """A body that is read on a thread."""
    return {"groups": [*groups, group(PADDING)]}


async def test_a_large_body_is_scored_like_a_small_one() -> None:
    async with running() as client:
        [small] = (await score(client, group(answer(), "no JSON")))["groups"]
        alike, _ = (await score(client, *large(group(answer(), "no JSON"))["groups"]))["groups"]
    assert alike == small


async def test_every_bad_field_of_a_large_body_is_named() -> None:
    body = large(group(1), {**group(), "nope": 1}, group(prompt=None))
    async with running() as client:
        refused = problem(await post(client, body), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == [
        "groups[0].completions[0]",
        "groups[1].nope",
        "groups[2].prompt",
    ]


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (f'{{"x": "{PADDING}"', "Expecting ',' delimiter"),
        ("[" * 10**5, "the body is nested too deeply"),
        (b'"\xff' + PADDING.encode(), "the body is not UTF-8"),
    ],
    ids=["open", "deep", "not UTF-8"],
)
async def test_a_large_body_that_is_no_json(content: str | bytes, detail: str) -> None:
    async with running() as client:
        answered = await client.post("/score", content=content, headers={"Content-Type": "application/json"})
    assert detail in problem(answered, 400, "malformed_body")["detail"]


async def test_values_are_bounded_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(max_body_values=100) as client:
        await score(client, group(answer(), prompt={"token_ids": [1] * 80}))
        with monkeypatch.context() as patched:
            patched.setattr(json, "loads", lambda *_: pytest.fail("it was read"))
            answered = await post(client, b"[" + b"0," * 100 + b"0]")
        refused = problem(answered, 413, "too_large")
    assert "max_body_values = 100" in refused["detail"]
    assert "101" in refused["detail"]


async def test_keys_of_an_object_are_bounded() -> None:
    keys = {str(i): i for i in range(json_body.MAX_KEYS - 1)}
    async with running() as client:
        await score(client, group(answer(), truth={**keys, "type": "terminate"}))
        beyond = {"groups": [group(answer(), truth={**keys, "type": "terminate", "one more": 1})]}
        refused = problem(await post(client, beyond), 413, "too_large")
    assert refused["detail"] == "an object has 65537 keys, at most 65536 are read"


@pytest.mark.parametrize(
    "body",
    [
        {"groups": [0] * 10**5},
        {"groups": [group(*[0] * 10**5)]},
        {"groups": [group({"token_ids": [-1] * 10**5})]},
        {"groups": [group(prompt=[0] * 10**5)]},
        {"groups": [], **{f"key {i}": 0 for i in range(10**4)}},
        {"groups": [{f"key {i}": 0 for i in range(10**4)}]},
        {"groups": [group(prompt=[{f"key {i}": 0 for i in range(10**4)}])]},
    ],
    ids=["groups", "completions", "ids", "messages", "keys", "a group's keys", "a message's keys"],
)
async def test_a_long_list_of_bad_values_gives_few_errors(body: dict[str, Any]) -> None:
    async with running() as client:
        refused = problem(await post(client, body), 422, "invalid_request")
    assert 1 <= len(refused["errors"]) <= 64


async def test_the_place_of_a_bad_value_in_a_long_list() -> None:
    completions = [""] * 100 + [0] + [""] * 100 + [0]
    async with running() as client:
        refused = problem(await post(client, {"groups": [group(*completions)]}), 422, "invalid_request")
    # The list is read in pieces, up to the first that has errors.
    assert [error["location"] for error in refused["errors"]] == ["groups[0].completions[100]"]


async def test_the_event_loop_runs_while_a_large_body_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, gate = threading.Event(), threading.Event()

    def loads(*arguments: Any, **options: Any) -> Any:
        reading.set()
        assert gate.wait(60)
        return real(*arguments, **options)

    real = json.loads
    async with running() as client:
        monkeypatch.setattr(json, "loads", loads)
        scoring = asyncio.ensure_future(post(client, large(group(answer()))))
        assert await asyncio.to_thread(reading.wait, 60)
        assert (await client.get("/health/live")).is_success
        gate.set()
        assert (await scoring).is_success


async def test_a_row_of_nemo_gym_is_echoed_whole() -> None:
    row = {
        "responses_create_params": {"input": "page", "more": [1]},
        "response": {"output": []},
        "ground_truth": TERMINATE,
        "padding": PADDING,
    }
    async with running() as client:
        answered: httpx.Response = await client.post("/dialects/nemo_gym/verify", json=row)
    assert answered.json().items() >= row.items()


@pytest.mark.parametrize("include", [[], ["tokens", "token_ids"]])
async def test_a_response_is_that_of_the_wire_model(include: list[str]) -> None:
    async with running() as client:
        groups = [group(answer(), "\ud800", prompt="page", id='"é'), group()]
        answered = await score(client, *groups, include=include)
    assert answered == ScoreResponse.model_validate(answered).model_dump(mode="json")


async def test_a_text_of_a_trainer_that_is_too_long_is_named_in_its_terms() -> None:
    body = {"prompt": "page", "response": "x" * 101, "label": TERMINATE}
    async with running(max_text_chars=100) as client:
        answered = await client.post("/dialects/slime/reward", json=body)
    refused = problem(answered, 413, "too_large")
    assert [error["location"] for error in refused["errors"]] == ["response"]


async def test_labels_of_a_large_body_are_registered() -> None:
    entries = [{"prompt": f"page {i}", "ground_truth": TERMINATE} for i in range(1000)]
    async with running() as client:
        body = {"labels": [*entries, {"prompt": PADDING, "ground_truth": TERMINATE}]}
        assert (await client.put("/labels", json=body)).json() == {"num_labels": 1001}
        scored = await client.post("/dialects/slime/reward", json={"prompt": "page 9", "response": answer()})
    assert scored.json() == 0.93
