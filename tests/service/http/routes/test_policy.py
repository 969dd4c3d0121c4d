"""The policy changes over HTTP: every number afterwards is that of a service started with the new weights."""

import asyncio
import json
import os
import pickle
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from shopr1_service.policy.fake import FakePolicy
from tests.support.http import metric, problem, running
from tests.support.models import FAMILIES, model_of, one_thread, tiny_model
from tests.support.updating import (
    EMBEDDING,
    HEAD,
    PART,
    Service,
    Unchanged,
    changed_model,
    done,
    file_of,
    flaws,
    numbers_of,
    saved,
    updatable,
    weights_of,
)

pytestmark = pytest.mark.anyio

NEW = file_of(changed_model())


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with updatable(policy_roots=(tmp_path / "root",), policy_version="start") as service:
        yield service


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


# --- loaded versions -------------------------------------------------------------------------------


async def test_every_response_names_its_version(service: Service) -> None:
    start = await service.state()
    assert start == {
        "model": "tiny",
        "current": start["base"],
        "base": {"version": "start", "number": 0, "adapter": None, "loaded_at": start["base"]["loaded_at"]},
        "adapters": [],
        "default_adapter": None,
        "update": None,
    }
    update = done(await service.upload(NEW, "step-1"))
    state = await service.state()
    assert (update["former"], update["current"]) == (start["base"], state["current"])
    named = {"version": "step-1", "number": 1, "adapter": None}
    assert state["base"] == state["current"] == {**named, "loaded_at": state["base"]["loaded_at"]}
    assert start["base"]["loaded_at"] <= state["base"]["loaded_at"]
    answered = await service.scored()
    assert answered["policy"] == {"model": "tiny", **named}
    for each in answered["groups"]:
        assert (each["policy_version"], each["policy_number"], each["adapter"]) == ("step-1", 1, None)
    info = done(await service.http.get("/info"))["policy"]
    assert (info["version"], info["number"]) == ("step-1", 1)


async def test_response_of_an_update(service: Service) -> None:
    update = done(await service.upload(NEW))
    weights = weights_of(tiny_model())
    assert update["num_tensors"] == len(weights)
    assert update["num_bytes"] == sum(tensor.nbytes for tensor in weights.values())
    assert 0 < update["pause_s"] <= update["duration_s"]
    assert update["unloaded_adapters"] == []


async def test_metrics_follow(service: Service) -> None:
    async def counted(name: str, **labels: str) -> float:
        return await metric(service.http, f"shopr1_{name}", **labels)

    for source in ("checkpoint", "upload", "transfer"):
        for outcome in ("done", "failed"):
            assert await counted("policy_updates_total", source=source, outcome=outcome) == 0
    done(await service.upload(NEW, "one"))
    problem(await service.upload(NEW[:-1], "two"), 422, "invalid_weights")
    problem(await service.update("nowhere", "three"), 422, "invalid_weights")
    assert await counted("policy_number") == 1
    assert await counted("policy_info", version="one") == 1
    assert await counted("policy_info") == 1  # of the former version nothing is left
    for source, outcome, number in (
        ("upload", "done", 1),
        ("upload", "failed", 1),
        ("checkpoint", "failed", 1),
    ):
        assert await counted("policy_updates_total", source=source, outcome=outcome) == number
    assert await counted("policy_swap_duration_seconds_count", source="upload") == 1
    assert await counted("policy_swap_duration_seconds_count", source="checkpoint") == 0
    assert await counted("policy_update_duration_seconds_count", source="upload") == 2
    num_bytes = sum(tensor.nbytes for tensor in weights_of(tiny_model()).values())
    assert await counted("policy_update_bytes_total", source="upload") == 2 * num_bytes - 1
    assert await counted("loaded_adapters") == 0


async def test_a_policy_without_weights() -> None:
    async with running(FakePolicy()) as client:
        state = done(await client.get("/policy"))
        assert (state["model"], state["current"]["version"]) == ("fake", "0")
        refused = await client.put("/policy/weights", params={"version": "1"}, content=NEW)
        assert "does not change" in problem(refused, 422, "invalid_request")["detail"]


# --- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
async def test_a_checkpoint_gives_the_numbers_of_a_fresh_service(
    service: Service, root: Path, max_shard_size: str
) -> None:
    model = changed_model()
    path = saved(root / "new", model, max_shard_size=max_shard_size)
    assert (root / "new" / "model.safetensors").exists() == (max_shard_size == "5GB")
    assert await service.numbers() == await numbers_of(tiny_model())
    done(await service.update(path))
    assert await service.numbers() == await numbers_of(model)
    # A relative path is below a root.
    saved(root / "old", tiny_model())
    done(await service.update("old"))
    assert await service.numbers() == await numbers_of(tiny_model())


async def test_a_part_of_the_weights(service: Service, root: Path) -> None:
    model = changed_model(prefix=PART)
    (root / "part").mkdir()
    safetensors.torch.save_file(weights_of(model, PART), root / "part" / "model.safetensors")
    await service.numbers()  # fills the cache
    async with Unchanged(service):
        missing = flaws(await service.update("part"))
    assert missing == dict.fromkeys(
        (name for name in weights_of(model) if not name.startswith(PART)), "it is missing"
    )
    done(await service.update("part", partial=True))
    assert await service.numbers() == await numbers_of(model)


async def test_any_sequence_of_updates(service: Service) -> None:
    """Whole, in part, and back to where it was."""
    model = tiny_model()
    for number, (seed, prefix) in enumerate(
        [(1, PART), (2, ""), (3, HEAD), (4, EMBEDDING), (0, "")], start=1
    ):
        given = weights_of(changed_model(seed) if seed else tiny_model(), prefix)
        model.load_state_dict(given, strict=False)
        update = done(await service.upload(file_of(given), f"{number}", partial=bool(prefix)))
        assert update["current"]["number"] == number
        assert await service.numbers() == await numbers_of(model)


@pytest.mark.parametrize(
    "family", ["llama_tied", "gpt2", "phi", "gemma2", "mamba", "qwen3_moe", "recurrent_gemma"]
)
async def test_every_kind_of_policy(family: str) -> None:
    """With a head that has a bias, one that is tied, and none that is linear; with and without a cache."""
    options = FAMILIES[family].options
    model = changed_model(kind=FAMILIES[family].kind, **options)
    async with updatable(model_of(family)) as service:
        before = await service.numbers()
        done(await service.upload(file_of(_untied(model))))
        after = await service.numbers()
        assert after == await numbers_of(model)
    assert after != before


def _untied(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone().contiguous()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


@pytest.mark.parametrize("given_dtype", [torch.float64, torch.float32, torch.float16])
async def test_a_dtype_becomes_the_policys_own(given_dtype: torch.dtype) -> None:
    given = changed_model()
    nn.Module.to(given, dtype=given_dtype)
    async with updatable(tiny_model(dtype=torch.bfloat16)) as service:
        done(await service.upload(file_of(given)))
        assert await service.numbers() == await numbers_of(nn.Module.to(given, dtype=torch.bfloat16))


async def test_the_cache_is_renewed_and_used_again(service: Service) -> None:
    async def hits() -> float:
        return await metric(service.http, "shopr1_prefix_cache_tokens_total", outcome="hit")

    await service.numbers()
    first = await hits()
    await service.numbers()
    assert (second := await hits()) > first
    done(await service.upload(NEW))
    await service.numbers()
    assert await hits() - second == first  # as in a fresh one: what the two prompts have in common
    await service.numbers()
    assert await hits() > second + first


# --- paths ------------------------------------------------------------------------------------------


async def test_paths_that_are_not_read(service: Service, root: Path, tmp_path: Path) -> None:
    outside = saved(tmp_path / "outside", changed_model())
    (root / "link").symlink_to(outside)
    saved(root / "linked", changed_model())
    file = root / "linked" / "model.safetensors"
    file.unlink()
    file.symlink_to(f"{outside}/model.safetensors")
    (root / "pickled").mkdir()
    (root / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    os.mkfifo(root / "pipe")
    expected = {
        outside: "no directory of this name below",
        "../outside": "must not contain '..'",
        f"{root}/../outside": "must not contain '..'",
        "link": "no directory of this name below",
        "none": "no directory of this name below",
        "/": "no directory of this name below",
        "pipe": "not a directory",
        "pickled": "pickled weights are not read",
        ".": "no weights there",
        "\0": "no directory of this name below",
    }
    async with Unchanged(service):
        for path, message in expected.items():
            assert message in flaws(await service.update(path))["path"]
        assert "leads out of" in flaws(await service.update("linked"))["model.safetensors"]


async def test_without_roots_nothing_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "new", changed_model())
    async with updatable() as service, Unchanged(service):
        assert "set `policy_roots`" in flaws(await service.update(path))["path"]


@pytest.mark.parametrize(
    ("body", "location"),
    [
        ({"path": "new"}, "version"),
        ({"version": "1"}, "path"),
        ({"path": "", "version": "1"}, "path"),
        ({"path": "new", "version": ""}, "version"),
        ({"path": "new", "version": "\ud800"}, "version"),
        ({"path": "new", "version": 1}, "version"),
        ({"path": "new", "version": "1", "partially": True}, "partially"),
    ],
)
async def test_malformed_requests(service: Service, body: dict[str, Any], location: str) -> None:
    async with Unchanged(service):
        # Half a surrogate pair can be sent as an escape only.
        content, headers = json.dumps(body), {"Content-Type": "application/json"}
        refused = await service.http.post("/policy/update", content=content, headers=headers)
    assert flaws(refused, 422, "invalid_request").keys() == {location}


# --- one at a time ----------------------------------------------------------------------------------


async def test_one_update_at_a_time(service: Service, root: Path) -> None:
    half, gate, has_begun = len(NEW) // 2, asyncio.Event(), asyncio.Event()
    saved(root / "new", changed_model())

    async def slow() -> AsyncIterator[bytes]:
        yield NEW[:half]
        has_begun.set()
        await gate.wait()
        yield NEW[half:]

    first = asyncio.create_task(service.upload(slow(), "first"))
    await has_begun.wait()
    for second in (await service.upload(NEW, "second"), await service.update("new", "second")):
        assert "'first' is under way" in problem(second, 409, "update_conflict")["detail"]
        assert int(second.headers["Retry-After"]) >= 1
    progress = (await service.state())["update"]
    assert (progress["version"], progress["stage"]) == ("first", "receiving")
    assert progress["age_s"] > 0
    assert await service.numbers() == await numbers_of(tiny_model())  # the old weights score meanwhile
    gate.set()
    assert done(await first)["current"]["number"] == 1
    assert (await service.state())["update"] is None
    assert done(await service.update("new", "second"))["current"]["number"] == 2
