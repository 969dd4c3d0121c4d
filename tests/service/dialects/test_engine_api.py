"""Bodies as trainers send them to SGLang and vLLM: each does what it says, or is answered with a problem."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shopr1_service.policy.fake import FakePolicy
from tests.support.http import problem, running
from tests.support.models import one_thread, tiny_model
from tests.support.updating import (
    Service,
    Unchanged,
    changed_model,
    done,
    flaws,
    numbers_of,
    saved,
    saved_adapter,
    updatable,
)

pytestmark = pytest.mark.anyio

# Other fields that SGLang's clients send.
UPDATE_MORE = {
    "load_format": None,
    "abort_all_requests": False,
    "is_async": False,
    "torch_empty_cache": False,
    "keep_pause": False,
    "recapture_cuda_graph": False,
    "token_step": 0,
    "flush_cache": True,
}
LOAD_MORE = {"pinned": False, "added_tokens_config": None, "base_model_name": None, "is_3d_lora_weight": None}
ENGINES = ["", "/v1"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with updatable(policy_roots=(tmp_path,)) as service:
        yield service


async def load(service: Service, engine: str, name: str, path: str, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, **LOAD_MORE, **more}
    return await service.http.post(f"{engine}/load_lora_adapter", json=body)


async def unload(service: Service, engine: str, name: str, **more: Any) -> httpx.Response:
    return await service.http.post(f"{engine}/unload_lora_adapter", json={"lora_name": name, **more})


# --- weights ----------------------------------------------------------------------------------------


async def test_weights_from_disk(service: Service, tmp_path: Path) -> None:
    saved(tmp_path / "new", changed_model())
    body = {"model_path": str(tmp_path / "new"), "weight_version": "120", **UPDATE_MORE}
    answered = done(await service.http.post("/update_weights_from_disk", json=body))
    assert answered["success"] is True
    assert answered["num_paused_requests"] == 0
    assert answered["message"].startswith("version '120' is loaded; scoring paused for 0.")
    assert await service.numbers() == await numbers_of(changed_model())
    known = done(await service.http.get("/model_info"))
    assert known == {"model_path": "tiny", "weight_version": "120", "is_generation": False}


@pytest.mark.parametrize("more", [{}, {"weight_version": None}])
async def test_a_version_without_a_name_is_its_number(
    service: Service, more: dict[str, None], tmp_path: Path
) -> None:
    saved(tmp_path / "new", changed_model())
    for number in (1, 2):
        done(await service.http.post("/update_weights_from_disk", json={"model_path": "new", **more}))
        current = (await service.state())["current"]
        assert (current["version"], current["number"]) == (f"{number}", number)


async def test_weights_that_are_refused(service: Service, tmp_path: Path) -> None:
    saved(tmp_path / "new", tiny_model(rms_norm_eps=0.1))
    async with Unchanged(service):
        for path, location in (("nowhere", "path"), ("new", "config.json: rms_norm_eps")):
            body = {"model_path": path, **UPDATE_MORE}
            assert flaws(await service.http.post("/update_weights_from_disk", json=body)).keys() == {location}
        for bad in ({}, {"model_path": ""}, {"model_path": 1}):
            refused = await service.http.post("/update_weights_from_disk", json=bad)
            assert flaws(refused, 422, "invalid_request").keys() == {"model_path"}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/pause_generation", {"mode": "abort"}),
        ("POST", "/pause_generation", None),
        ("POST", "/continue_generation", {}),
        ("POST", "/flush_cache", None),
        ("GET", "/flush_cache", None),
    ],
)
async def test_routes_that_are_not_needed_do_nothing(
    service: Service, method: str, path: str, body: Any
) -> None:
    async with Unchanged(service):
        answered = await service.http.request(method, path, json=body)
    assert answered.status_code == 200
    assert answered.text.startswith("Nothing to do")


# --- adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
async def test_adapters_are_loaded_and_unloaded(service: Service, engine: str, tmp_path: Path) -> None:
    base = await service.numbers()
    loaded = await load(service, engine, "grpo", saved_adapter(tmp_path / "a"))
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'grpo' is loaded.")
    assert loaded.headers["Content-Type"].startswith("text/plain")
    own = await service.numbers(adapter="grpo")
    assert own != base
    [adapter] = (await service.state())["adapters"]
    assert (adapter["adapter"], adapter["version"]) == ("grpo", "1")
    gone = await unload(service, engine, "grpo", lora_int_id=1)
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'grpo' is unloaded.")
    assert (await service.state())["adapters"] == []


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_known_name_must_be_meant(service: Service, engine: str, tmp_path: Path) -> None:
    first, second = (saved_adapter(tmp_path / f"{seed}", seed) for seed in (4, 5))
    assert (await load(service, engine, "grpo", first, load_inplace=True)).status_code == 200
    former = await service.numbers(adapter="grpo")
    async with Unchanged(service):
        for more in ({}, {"load_inplace": False}):
            refused = await load(service, engine, "grpo", second, **more)
            found = flaws(refused, 422, "invalid_request")
            assert "set load_inplace" in found["lora_name"]
    assert (await load(service, engine, "grpo", second, load_inplace=True)).status_code == 200
    service.forget_prompts()
    assert await service.numbers(adapter="grpo") != former
    service.forget_prompts()
    assert await service.numbers(adapter="grpo", policy_version={"exact": 1}) == former


@pytest.mark.parametrize("engine", ENGINES)
async def test_adapters_that_are_refused(service: Service, engine: str, tmp_path: Path) -> None:
    path = saved_adapter(tmp_path / "a")
    async with Unchanged(service):
        assert flaws(await load(service, engine, "a", "nowhere")).keys() == {"path"}
        problem(await load(service, engine, "base", path), 422, "invalid_weights")
        assert flaws(await load(service, engine, "a b", path), 422, "invalid_request").keys() == {"lora_name"}
        problem(await unload(service, engine, "a"), 404, "not_found")
        refused = await service.http.post(f"{engine}/load_lora_adapter", json={"lora_name": "a"})
        assert flaws(refused, 422, "invalid_request").keys() == {"lora_path"}


async def test_a_policy_without_weights() -> None:
    async with running(FakePolicy()) as client:
        for path, body in (
            ("/update_weights_from_disk", {"model_path": "new"}),
            ("/load_lora_adapter", {"lora_name": "a", "lora_path": "a"}),
            ("/v1/unload_lora_adapter", {"lora_name": "a"}),
        ):
            problem(await client.post(path, json=body), 422, "invalid_request")
        assert done(await client.get("/model_info"))["weight_version"] == "0"
