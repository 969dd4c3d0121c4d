"""The routes besides `/score`, and that they are right behind a real socket as well."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from shopr1_client import Client
from shopr1_client.wire import Info, ScoreRequest
from shopr1_rewards import Recipe, load_recipe
from shopr1_service import __version__
from shopr1_service.policy.fake import FakePolicy
from tests.support.http import CLICK, answer, group, problem, rewards, running, served, write_recipe

pytestmark = pytest.mark.anyio


async def test_info(tmp_path: Path) -> None:
    mine = write_recipe(tmp_path, ("dars = 1000.0", "dars = 10.0"))
    limits = {
        "max_body_bytes": 5000,
        "max_groups": 3,
        "max_completions_per_group": 4,
        "max_request_tokens": 1000,
        "max_text_chars": 2000,
    }
    async with running(FakePolicy(max_sequence_tokens=77), recipe=mine, **limits) as client:
        response = await client.get("/info")
    refs = [{"name": recipe.name, "digest": recipe.digest} for recipe in map(load_recipe, ("shop_r1", mine))]
    assert response.json() == {
        "version": __version__,
        "policy": {
            "model": "fake",
            "version": "0",
            "number": 0,
            "architecture": "FakePolicy",
            "dtype": "float64",
            "device": "cpu",
            "num_head_rows": 0x110000,
            "num_tokenizer_tokens": 0x110000,
            "max_sequence_tokens": 77,
            "head": "fake",
            "forward": "fake",
            "attention": "model",
            "rejected_paths": [],
            "remarks": [],
        },
        "limits": limits,
        "default_recipe": refs[1],
        "recipes": refs,
    }
    assert Info.model_validate_json(response.content).limits.max_groups == 3


async def test_recipes(tmp_path: Path) -> None:
    mine = write_recipe(tmp_path, ("dars = 1000.0", "dars = 10.0"))
    async with running(recipe=mine) as client:
        listed = (await client.get("/recipes")).json()
        shown = {ref["name"]: (await client.get(f"/recipes/{ref['name']}")).json() for ref in listed}
    assert [ref["name"] for ref in listed] == ["shop_r1", "mine"]
    for ref in listed:
        assert Recipe.model_validate(shown[ref["name"]]).digest == ref["digest"]
    assert shown["mine"]["action_space"]["dars"] == 10.0
    assert shown["shop_r1"]["self_certainty"] == {
        "alpha": 0.005,
        "divergence": "kl_u_p",
        "span": "rationale",
        "position": "predict",
        "temperature": 1.0,
        "vocabulary": "head",
    }


async def test_a_file_takes_the_place_of_a_shipped_recipe(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ("reward = 0.5", "reward = 0.25"), ('"mine"', '"shop_r1"'))
    async with running(recipe=path) as client:
        [ref] = (await client.get("/recipes")).json()
        [reward] = await rewards(client, answer())
    assert ref == {"name": "shop_r1", "digest": load_recipe(path).digest}
    assert ref["digest"] != load_recipe("shop_r1").digest
    assert reward["components"]["format"] == 0.25


@pytest.mark.parametrize("name", ["nope", "shop_r1.toml", "..", "%2e%2e%2fetc", "shop_r1%00"])
async def test_unknown_recipe(name: str) -> None:
    async with running() as client:
        problem(await client.get(f"/recipes/{name}"), 404, "not_found")


@pytest.mark.parametrize("state", ["live", "ready"])
async def test_health(state: str) -> None:
    async with running() as client:
        response = await client.get(f"/health/{state}")
    assert (response.status_code, response.json()) == (200, {"status": state})


# --- behind a socket --------------------------------------------------------------------------------


def test_scoring_over_a_socket() -> None:
    with served(FakePolicy(26.0)) as url, Client(url) as client:
        request = ScoreRequest.model_validate({"groups": [group(answer(CLICK), "{", truth=CLICK, id="é")]})
        [scored] = client.score(request).groups
        assert client.info().policy.model == "fake"
    assert scored.id == "é"
    assert [reward.reward for reward in scored.rewards] == [1001.13, 0.0]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_too_large_over_a_socket(is_streamed: bool) -> None:
    with served(max_body_bytes=1000) as url:
        content: Any = iter([b" " * 600] * 2) if is_streamed else b" " * 1001
        response = httpx.post(f"{url}/score", content=content, headers={"Content-Type": "application/json"})
        problem(response, 413, "too_large")
        assert httpx.get(f"{url}/health/ready").status_code == 200


def test_problems_over_a_socket() -> None:
    with served() as url:
        problem(httpx.get(f"{url}/nope"), 404, "not_found")
        problem(httpx.get(f"{url}/score"), 405, "method_not_allowed")
        problem(httpx.post(f"{url}/score", content=b"{"), 422, "invalid_request")
        problem(httpx.post(f"{url}/score", json={}, headers={"X-Request-ID": "a b"}), 422, "invalid_request")
