"""Bodies as trainers send them to SGLang and vLLM: each does what it says, or is answered with a problem."""

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shopr1_service.policy.fake import FakePolicy
from tests.support.http import PROBLEM_KEYS, running
from tests.support.models import one_thread, tiny_model
from tests.support.updating import (
    Service,
    Unchanged,
    changed_model,
    done,
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
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


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


def refusal(engine: str, answered: httpx.Response, status: int, code: str) -> dict[str, str]:
    """The flaws of a problem that also has the members that the engine's clients read."""
    body = answered.json()
    detail = body["detail"]
    members: dict[str, Any]
    if engine == "/v1":
        param = body["errors"][0]["location"] if body["errors"] else None
        kind = "NotFoundError" if status == 404 else "BadRequestError"
        members = {"error": {"message": detail, "type": kind, "param": param, "code": status}}
    else:
        members = {"success": False, "message": detail, "error_message": detail}
    assert {key: value for key, value in body.items() if key not in PROBLEM_KEYS} == members
    assert (answered.status_code, body["status"], body["code"]) == (status, status, code)
    assert answered.headers["Content-Type"] == "application/problem+json"
    return {error["location"]: error["message"] for error in body["errors"]}


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
            refused = await service.http.post("/update_weights_from_disk", json=body)
            assert refusal("", refused, 422, "invalid_weights").keys() == {location}
        for bad in ({}, {"model_path": ""}, {"model_path": 1}):
            refused = await service.http.post("/update_weights_from_disk", json=bad)
            assert refusal("", refused, 422, "invalid_request").keys() == {"model_path"}


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        (
            "POST",
            "/pause_generation",
            {"mode": "abort"},
            {"message": "Generation paused successfully.", "status": "ok"},
        ),
        ("POST", "/pause_generation", None, {"message": "Generation paused successfully.", "status": "ok"}),
        (
            "POST",
            "/continue_generation",
            {},
            {"message": "Generation continued successfully.", "status": "ok"},
        ),
        ("POST", "/flush_cache", None, FLUSHED),
        ("GET", "/flush_cache", None, FLUSHED),
    ],
)
async def test_routes_that_are_not_needed_do_nothing(
    service: Service, method: str, path: str, body: Any, expected: Any
) -> None:
    """They answer as SGLang 0.5.23 does."""
    async with Unchanged(service):
        answered = await service.http.request(method, path, json=body)
    assert answered.status_code == 200
    assert (answered.text if isinstance(expected, str) else answered.json()) == expected


# --- adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
async def test_adapters_are_loaded_and_unloaded(service: Service, engine: str, tmp_path: Path) -> None:
    base = await service.numbers()
    path = saved_adapter(tmp_path / "a")
    loaded = await load(service, engine, "grpo", path)
    assert loaded.status_code == 200
    if engine == "/v1":
        assert loaded.text == "Success: LoRA adapter 'grpo' added successfully."
        assert loaded.headers["Content-Type"].startswith("text/plain")
    else:
        assert loaded.json() == {"success": True, "error_message": "", "loaded_adapters": {"grpo": path}}
    own = await service.numbers(adapter="grpo")
    assert own != base
    [adapter] = (await service.state())["adapters"]
    assert (adapter["adapter"], adapter["version"]) == ("grpo", "1")
    gone = await unload(service, engine, "grpo", lora_int_id=1)
    assert gone.status_code == 200
    if engine == "/v1":
        assert gone.text == "Success: LoRA adapter 'grpo' removed successfully."
    else:
        assert gone.json() == {"success": True, "error_message": "", "loaded_adapters": {}}
    assert (await service.state())["adapters"] == []


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_known_name_must_be_meant(service: Service, engine: str, tmp_path: Path) -> None:
    first, second = (saved_adapter(tmp_path / f"{seed}", seed) for seed in (4, 5))
    assert (await load(service, engine, "grpo", first, load_inplace=True)).status_code == 200
    former = await service.numbers(adapter="grpo")
    async with Unchanged(service):
        for more in ({}, {"load_inplace": False}):
            refused = await load(service, engine, "grpo", second, **more)
            found = refusal(engine, refused, 422, "invalid_request")
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
        missing = await load(service, engine, "a", "nowhere")
        assert refusal(engine, missing, 422, "invalid_weights").keys() == {"path"}
        refusal(engine, await load(service, engine, "base", path), 422, "invalid_weights")
        malformed = await load(service, engine, "a b", path)
        assert refusal(engine, malformed, 422, "invalid_request").keys() == {"lora_name"}
        refusal(engine, await unload(service, engine, "a"), 404, "not_found")
        refused = await service.http.post(f"{engine}/load_lora_adapter", json={"lora_name": "a"})
        assert refusal(engine, refused, 422, "invalid_request").keys() == {"lora_path"}


UPDATES: dict[str, dict[str, str]] = {
    "/policy/update": {"path": "new", "version": "1"},
    "/update_weights_from_disk": {"model_path": "new"},
}
ADAPTERS: dict[str, dict[str, str]] = {
    "/policy/adapters": {"path": "new", "name": "a"},
    "/load_lora_adapter": {"lora_path": "new", "lora_name": "a"},
    "/v1/load_lora_adapter": {"lora_path": "new", "lora_name": "a"},
}
FILES = [
    *itertools.product(
        UPDATES, ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    ),
    *itertools.product(ADAPTERS, ["adapter_config.json", "adapter_model.safetensors"]),
]


@pytest.mark.parametrize(("route", "name"), FILES)
async def test_links_out_of_the_roots_by_every_route(
    service: Service, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, route: str, name: str
) -> None:
    outside = tmp_path_factory.mktemp("outside") / name
    outside.write_text('{"confidential": "confidential"}')
    if route in ADAPTERS:
        saved_adapter(tmp_path / "new")
    else:
        saved(tmp_path / "new", changed_model())
    (tmp_path / "new" / name).unlink()
    (tmp_path / "new" / name).symlink_to(outside)
    async with Unchanged(service):
        refused = await service.http.post(route, json=(UPDATES | ADAPTERS)[route])
    assert refused.status_code == 422, refused.text
    assert refused.json()["detail"] == f"{name} is not there, or a link that leads out of the `policy_roots`"
    assert "confidential" not in refused.text


async def test_adapters_without_a_path(service: Service, tmp_path: Path) -> None:
    """SGLang names the paths of all loaded adapters, and `__tensor__` for those that came as tensors."""
    paths = {name: saved_adapter(tmp_path / name, seed) for name, seed in (("a", 4), ("b", 5))}
    done(await service.http.post("/policy/adapters", json={"name": "a", "path": paths["a"]}))
    loaded = done(await load(service, "", "b", paths["b"]))
    assert loaded["loaded_adapters"] == {"a": "__tensor__", "b": paths["b"]}
    gone = done(await unload(service, "", "a"))
    assert gone["loaded_adapters"] == {"b": paths["b"]}


async def test_a_policy_without_weights() -> None:
    async with running(FakePolicy()) as client:
        for engine, path, body in (
            ("", "/update_weights_from_disk", {"model_path": "new"}),
            ("", "/load_lora_adapter", {"lora_name": "a", "lora_path": "a"}),
            ("/v1", "/v1/unload_lora_adapter", {"lora_name": "a"}),
        ):
            refusal(engine, await client.post(path, json=body), 422, "invalid_request")
        assert done(await client.get("/model_info"))["weight_version"] == "0"
