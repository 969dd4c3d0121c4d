"""Adapters, loaded and unloaded over HTTP: each gives the numbers of merged weights."""

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shopr1_client.wire_policy import ADAPTER_CONFIG_KEY
from shopr1_service.weights.files import AnonymousTempFile
from tests.support.adapters import BYPASSED, linear_sizes, merged, random_tensors
from tests.support.broken_updates import ADAPTER_CONFIG
from tests.support.http import metric, post, problem
from tests.support.models import model_of, one_thread, tiny_model
from tests.support.staging import full_disk
from tests.support.updating import (
    HUGE,
    Service,
    Unchanged,
    adapter_file,
    changed_model,
    done,
    file_of,
    flaws,
    numbers_of,
    saved_adapter,
    staged_files,
    updatable,
)

pytestmark = pytest.mark.anyio

TOLERANCE_NATS = 1e-4
"""Merged in fp64, against applied in fp32."""
NEW = file_of(changed_model())


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with updatable(policy_roots=(tmp_path,)) as service:
        yield service


async def merged_numbers(seed: int) -> list[float]:
    """Numbers of a service whose weights have the adapter merged into them."""
    model = tiny_model()
    model.load_state_dict(merged(model, random_tensors(model, seed=seed))._model.state_dict())
    return await numbers_of(model)


def is_close(some: Sequence[float], others: Sequence[float]) -> bool:
    return list(some) == pytest.approx(list(others), rel=0, abs=TOLERANCE_NATS)


# --- loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_path", [False, True])
async def test_an_adapter_has_the_numbers_of_merged_weights(
    service: Service, is_path: bool, tmp_path: Path
) -> None:
    base = await service.numbers()
    if is_path:
        loaded = done(await service.load_adapter("a", saved_adapter(tmp_path / "a"), version="x"))
    else:
        loaded = done(await service.upload_adapter("a", adapter_file(), version="x"))
    own = await service.numbers(adapter="a")
    assert is_close(own, await merged_numbers(4))
    assert not is_close(own, base)
    assert (loaded["current"]["version"], loaded["current"]["number"], loaded["rank"]) == ("x", 1, 3)
    sizes = linear_sizes(tiny_model())
    assert loaded["num_layers"] == len(sizes)
    assert loaded["num_bytes"] == sum(4 * 3 * (outputs + inputs) for outputs, inputs in sizes.values())
    assert loaded["unloaded"] == []
    assert loaded["duration_s"] > 0
    state = await service.state()
    assert state["adapters"] == [loaded["current"]]
    assert state["current"] == state["base"]
    assert state["default_adapter"] is None


async def test_prompts_are_kept_apart(service: Service) -> None:
    """The same prompts in turns: what is kept of them is never another's."""
    expected = {
        "base": await numbers_of(tiny_model()),
        "a": await merged_numbers(4),
        "b": await merged_numbers(5),
    }
    for name, seed in (("a", 4), ("b", 5)):
        done(await service.upload_adapter(name, adapter_file(seed)))
    for name in ("a", "base", "b", "a", "base", "b"):
        assert is_close(await service.numbers(adapter=name), expected[name])
    assert await metric(service.http, "shopr1_prefix_cache_tokens_total", outcome="hit") > 0
    assert not is_close(expected["a"], expected["b"])


async def test_answers_name_the_adapter(service: Service) -> None:
    done(await service.upload_adapter("a", adapter_file(), version="x"))
    answered = await service.scored(adapter="a")
    assert answered["policy"] == {"model": "tiny", "version": "x", "number": 1, "adapter": "a"}
    for each in answered["groups"]:
        assert (each["policy_version"], each["policy_number"], each["adapter"]) == ("x", 1, "a")
    assert (await service.scored())["policy"]["adapter"] is None


async def test_a_default_scores_requests_without_a_name(service: Service) -> None:
    base = await service.numbers()
    done(await service.upload_adapter("a", adapter_file(), default=True))
    assert await service.numbers() == pytest.approx(await merged_numbers(4), rel=0, abs=TOLERANCE_NATS)
    assert is_close(await service.numbers(adapter="base"), base)
    state = await service.state()
    assert (state["default_adapter"], state["current"]["adapter"], state["base"]["adapter"]) == (
        "a",
        "a",
        None,
    )
    info = done(await service.http.get("/info"))["policy"]
    assert (info["version"], info["number"]) == ("1", 1)
    assert await metric(service.http, "shopr1_policy_number") == 1
    state = done(await service.http.delete("/policy/adapters/a"))
    assert (state["default_adapter"], state["current"]["number"]) == (None, 0)
    assert is_close(await service.numbers(), base)


async def test_the_last_versions_stay(service: Service) -> None:
    for seed, version in ((4, "x"), (5, "y"), (6, "z")):
        last = done(await service.upload_adapter("a", adapter_file(seed), version=version))
    assert [each["version"] for each in last["unloaded"]] == ["x"]
    assert [each["version"] for each in (await service.state())["adapters"]] == ["y", "z"]
    assert await metric(service.http, "shopr1_loaded_adapters") == 2
    for demand, seed in (("y", 5), ("z", 6), ({"exact": 2}, 5), ({"at_least": "x"}, 6)):
        own = await service.numbers(adapter="a", policy_version=demand)
        assert is_close(own, await merged_numbers(seed))
    refused = await post(service.http, {"groups": [], "adapter": "a", "policy_version": "x"})
    problem(refused, 409, "policy_version")
    assert "Retry-After" not in refused.headers


async def test_a_request_that_waits_for_an_adapters_version(service: Service) -> None:
    done(await service.upload_adapter("a", adapter_file(4)))
    demand = {"at_least": 2, "wait_s": 120.0}
    waiting = asyncio.create_task(service.numbers(adapter="a", policy_version=demand))
    while not service.app.state.shopr1.engine.new_versions._changed._waiters:
        assert not waiting.done()
        await asyncio.sleep(0)
    done(await service.upload_adapter("a", adapter_file(5)))
    assert is_close(await waiting, await merged_numbers(5))


# --- unloading --------------------------------------------------------------------------------------


async def test_unloading(service: Service) -> None:
    for name, version, seed in (("a", "x", 4), ("a", "y", 5), ("b", "x", 6)):
        done(await service.upload_adapter(name, adapter_file(seed), version=version))
    state = done(await service.http.delete("/policy/adapters/a", params={"version": "y"}))
    assert [(each["adapter"], each["version"]) for each in state["adapters"]] == [("a", "x"), ("b", "x")]
    assert is_close(await service.numbers(adapter="a"), await merged_numbers(4))
    state = done(await service.http.delete("/policy/adapters/a"))
    assert [each["adapter"] for each in state["adapters"]] == ["b"]
    refused = await post(service.http, {"groups": [], "adapter": "a"})
    message = "no adapter 'a' is loaded; there are: base, b"
    assert flaws(refused, 422, "invalid_request") == {"adapter": message}
    assert await metric(service.http, "shopr1_loaded_adapters") == 1
    # A number is given once.
    assert done(await service.upload_adapter("a", adapter_file()))["current"]["number"] == 6


@pytest.mark.parametrize("path", ["b", "base", "a?version=z"])
async def test_unloading_an_adapter_that_is_not_loaded(service: Service, path: str) -> None:
    done(await service.upload_adapter("a", adapter_file(), version="x"))
    async with Unchanged(service):
        problem(await service.http.delete(f"/policy/adapters/{path}"), 404, "not_found")


async def test_new_weights_unload_all_adapters(service: Service) -> None:
    for name in ("b", "a"):
        done(await service.upload_adapter(name, adapter_file(), default=True))
    update = done(await service.upload(NEW))
    assert update["unloaded_adapters"] == ["a", "b"]
    assert (update["former"]["number"], update["current"]["number"]) == (0, 3)
    state = await service.state()
    assert (state["adapters"], state["default_adapter"]) == ([], None)
    assert await metric(service.http, "shopr1_loaded_adapters") == 0
    assert await service.numbers() == await numbers_of(changed_model())
    assert flaws(await post(service.http, {"groups": [], "adapter": "a"}), 422, "invalid_request")


async def test_weights_that_change_meanwhile(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter is checked against weights; it is not put on others."""
    content, gate, has_begun = adapter_file(), asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield content[:1000]
        has_begun.set()
        await gate.wait()
        yield content[1000:]

    loading = asyncio.create_task(service.upload_adapter("a", slow()))
    await has_begun.wait()
    done(await service.upload(NEW))
    gate.set()
    refused = await loading
    assert "changed meanwhile" in problem(refused, 409, "update_conflict")["detail"]
    assert int(refused.headers["Retry-After"]) >= 1
    assert (await service.state())["adapters"] == []


# --- refusals ---------------------------------------------------------------------------------------


def _with(**changes: Any) -> bytes:
    config = json.dumps({**json.loads(ADAPTER_CONFIG), **changes})
    return adapter_file(config=config)


def _changed(scale: float = 1.0, **more: torch.Tensor) -> bytes:
    tensors = random_tensors(tiny_model())
    scaled = {name: tensor * scale if "lora_B" in name else tensor for name, tensor in tensors.items()}
    return file_of({**scaled, **more}, **{ADAPTER_CONFIG_KEY: ADAPTER_CONFIG})


NAN = _changed(float("nan"))
REFUSED = {
    "no config": (adapter_file(config=None), "metadata has no adapter_config"),
    "no JSON": (adapter_file(config="{"), ""),
    "DoRA": (_with(use_dora=True), "use_dora"),
    "another rank": (_with(r=4), "module and config need [4, 48]"),
    "NaN": (NAN, "not finite"),
    "infinite logits": (_changed(HUGE), "logits are not finite"),
    "unknown tensor": (_changed(x=torch.zeros(1)), "only lora_A.weight"),
    "truncated": (adapter_file()[:-1], "1 bytes too early"),
    "too long": (adapter_file() + b"\0", "1 bytes more"),
    "no tensors": (file_of({}, **{ADAPTER_CONFIG_KEY: ADAPTER_CONFIG}), "has none"),
    "weights": (NEW, "metadata has no adapter_config"),
}


@pytest.mark.parametrize("flaw", REFUSED)
async def test_a_refused_adapter_leaves_all_as_it_is(service: Service, flaw: str) -> None:
    content, message = REFUSED[flaw]
    done(await service.upload_adapter("a", adapter_file(), default=True))
    async with Unchanged(service):
        for name in ("a", "b"):
            refused = problem(await service.upload_adapter(name, content), 422, "invalid_weights")
            assert message in refused["detail"]
    assert service.policy._adapters.keys() == {1}
    done(await service.upload_adapter("b", adapter_file()))


async def test_an_adapter_that_is_damaged_on_disk(service: Service, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    async with Unchanged(service):
        assert "no weights there" in flaws(await service.load_adapter("a", "a"))["path"]
        assert "no directory of this name" in flaws(await service.load_adapter("a", "/etc"))["path"]
        assert "must not contain" in flaws(await service.load_adapter("a", "../a"))["path"]
        saved_adapter(tmp_path / "b")
        (tmp_path / "b" / "adapter_config.json").write_text("{")
        problem(await service.load_adapter("a", "b"), 422, "invalid_weights")


async def test_full_disk_for_an_adapter(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Unchanged(service):
        with monkeypatch.context() as patch:
            full_disk(patch)
            refused = await service.upload_adapter("a", adapter_file())
    detail = problem(refused, 507, "storage")["detail"]
    assert detail == "the adapter cannot be kept in staging_dir: No space left on device"
    done(await service.upload_adapter("a", adapter_file()))


@pytest.mark.parametrize("is_upload", [False, True])
async def test_disk_that_fails_while_an_adapter_is_read(
    service: Service, tmp_path: Path, is_upload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_adapter(tmp_path / "lora")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with Unchanged(service):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            if is_upload:
                refused = await service.upload_adapter("a", adapter_file())
            else:
                refused = await service.load_adapter("a", "lora")
    assert "cannot be read" in problem(refused, 507, "storage")["detail"]


async def test_adapter_is_written_down_as_it_arrives(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read again one tensor at a time, and once."""
    before, read_bytes = staged_files(), list[int]()
    read_into = AnonymousTempFile.read_into

    def counting(file: AnonymousTempFile, block: memoryview, start: int) -> None:
        read_bytes.append(block.nbytes)
        read_into(file, block, start)

    monkeypatch.setattr(AnonymousTempFile, "read_into", counting)
    done(await service.upload_adapter("a", adapter_file()))
    sizes = [tensor.nbytes for tensor in random_tensors(tiny_model(), seed=4).values()]
    assert sorted(read_bytes) == sorted(sizes)
    assert staged_files() == before


async def test_how_many_and_how_large(tmp_path: Path) -> None:
    num_bytes = len(adapter_file()) - 2000  # without the header
    async with updatable(max_adapters=2, max_adapter_bytes=num_bytes // 2) as service:
        async with Unchanged(service):
            refused = await service.upload_adapter("a", adapter_file())
        assert "max_adapter_bytes" in problem(refused, 413, "too_large")["detail"]
    async with updatable(max_adapters=2) as service:
        for name in ("a", "b", "a"):
            done(await service.upload_adapter(name, adapter_file()))
        async with Unchanged(service):
            refused = await service.upload_adapter("c", adapter_file())
        detail = problem(refused, 413, "too_large")["detail"]
        assert detail == "2 adapters are loaded, max_adapters = 2"
        done(await service.http.delete("/policy/adapters/b"))
        done(await service.upload_adapter("c", adapter_file()))


async def test_no_adapter_is_called_base(service: Service, tmp_path: Path) -> None:
    path = saved_adapter(tmp_path / "a")
    async with Unchanged(service):
        for refused in (
            await service.upload_adapter("base", adapter_file()),
            await service.load_adapter("base", path),
        ):
            assert "that means none" in problem(refused, 422, "invalid_weights")["detail"]


@pytest.mark.parametrize("name", ["ä", "a b", "a" * 129, "a%00"])
async def test_names_that_are_none(service: Service, name: str) -> None:
    async with Unchanged(service):
        refused = await service.upload_adapter(name, adapter_file())
        assert flaws(refused, 422, "invalid_request").keys() == {"path.name"}
        refused = await service.load_adapter(name, "a")
        assert flaws(refused, 422, "invalid_request").keys() == {"name"}


async def test_names_that_requests_cannot_have(service: Service) -> None:
    for name in ("", "ä", 1):
        refused = await post(service.http, {"groups": [], "adapter": name})
        assert flaws(refused, 422, "invalid_request").keys() == {"adapter"}


async def test_an_adapter_that_nothing_notices() -> None:
    """Where the forward computes past a module, an adapter of it would do nothing, in silence."""
    content = file_of(random_tensors(model_of("mamba")), **{ADAPTER_CONFIG_KEY: ADAPTER_CONFIG})
    async with updatable(model_of("mamba")) as service:
        async with Unchanged(service):
            refused = await service.upload_adapter("a", content)
        assert flaws(refused) == dict.fromkeys(BYPASSED["mamba"], "it is never called")
