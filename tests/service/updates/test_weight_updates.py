"""Updates that fail after their weights were received: the old ones are restored, to the last bit."""

import asyncio
import errno
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shopr1_client import Client
from shopr1_service.core import FatalEngineError
from shopr1_service.weights.files import AnonymousTempFile
from tests.support.http import WAIT_S, metric, problem, served
from tests.support.models import MIXTURES, MULTIMODAL, one_thread, policy_of, tiny_model
from tests.support.staging import check_equal
from tests.support.updating import (
    HEAD,
    HUGE,
    NORM,
    PART,
    Service,
    Unchanged,
    changed,
    changed_model,
    done,
    file_of,
    flaws,
    numbers_of,
    saved,
    staged_files,
    updatable,
    weights_of,
)

pytestmark = pytest.mark.anyio

NEW = file_of(changed_model())
INFINITE = file_of({**weights_of(changed_model(7)), HEAD: torch.full((389, 32), HUGE)})
INFINITE_PART = file_of({NORM: torch.full((32,), HUGE)})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    (tmp_path / "staging").mkdir()
    async with updatable(policy_roots=(tmp_path,), staging_dir=tmp_path / "staging") as service:
        yield service
    assert list((tmp_path / "staging").iterdir()) == []


# --- logits that are not finite ---------------------------------------------------------------------


@pytest.mark.parametrize(("content", "is_partial"), [(INFINITE, False), (INFINITE_PART, True)])
async def test_weights_that_the_policy_cannot_compute_with(
    service: Service, content: bytes, is_partial: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    for seed, prefix in ((2, ""), (3, PART), (4, NORM)):
        given = weights_of(changed_model(seed), prefix)
        model.load_state_dict(given, strict=False)
        done(await service.upload(file_of(given), partial=True))
        async with Unchanged(service):
            # Twice: the backup of the first time is still valid.
            for _ in range(2):
                refused = await service.upload(content, "broken", partial=is_partial)
                assert "logits are not finite" in problem(refused, 422, "invalid_weights")["detail"]
        assert "version 'broken' was refused, rolling back" in caplog.text
        service.forget_prompts()
        assert await service.numbers() == await numbers_of(model)


async def test_the_very_first_update_fails(service: Service) -> None:
    """The rollback restores the weights that were loaded at start."""
    for content, is_partial in ((INFINITE_PART, True), (INFINITE, False)):
        before = await service.state()
        problem(await service.upload(content, partial=is_partial), 422, "invalid_weights")
        assert await service.state() == before
        assert await service.numbers() == await numbers_of(tiny_model())
    done(await service.upload(NEW))
    assert await service.numbers() == await numbers_of(changed_model())


# --- disks ------------------------------------------------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, *calls: int) -> list[int]:
    """Make reading fail at these calls; returns the numbers of the calls so far."""
    read_into, made, numbers = AnonymousTempFile.read_into, list[int](), itertools.count()

    def failing(file: AnonymousTempFile, block: memoryview, start: int) -> None:
        number = next(numbers)  # by one step: several threads call it
        made.append(number)
        if number in calls:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        read_into(file, block, start)

    monkeypatch.setattr(AnonymousTempFile, "read_into", failing)
    return made


@pytest.mark.parametrize("call", [0, 20])
async def test_a_disk_that_fails_in_the_check(
    service: Service, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Unchanged(service):
        with monkeypatch.context() as patch:
            fail_at(patch, call)
            refused = await service.upload(NEW)
        assert "cannot be read: Input/output error" in problem(refused, 507, "storage")["detail"]
    done(await service.upload(NEW))
    assert await service.numbers() == await numbers_of(changed_model())


@pytest.mark.parametrize("call", [0, 1, 20, -1])
async def test_a_disk_that_fails_in_the_swap(
    service: Service, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(await service.upload(file_of(changed_model(2))))
    num_tensors = len(weights_of(tiny_model()))
    call = call % num_tensors
    async with Unchanged(service):
        with monkeypatch.context() as patch:
            made = fail_at(patch, num_tensors + call)  # after the check, which reads each tensor once
            refused = await service.upload(NEW)
        assert "cannot be read: Input/output error" in problem(refused, 507, "storage")["detail"]
        # Up to the failure, what threads did until it was seen, and the whole rollback.
        assert call + 1 + num_tensors <= len(made) - num_tensors <= 2 * num_tensors
    done(await service.upload(NEW))
    assert await service.numbers() == await numbers_of(changed_model())


async def test_a_rollback_that_fails_ends_the_service(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, *range(len(weights_of(tiny_model())) + 5, 1000))
    engine = service.engine
    refused = await service.upload(NEW)
    assert "the engine has failed" in problem(refused, 503, "not_ready")["detail"]
    assert int(refused.headers["Retry-After"]) >= 1
    # The engine's thread reports it after it has failed the update.
    await asyncio.to_thread(engine.join, WAIT_S)
    [failure] = service.failures
    assert isinstance(failure, FatalEngineError)
    assert "so did the rollback" in str(failure)
    problem(await service.http.get("/health/ready"), 503, "not_ready")
    problem(await service.http.post("/score", json={"groups": []}), 503, "not_ready")
    problem(await service.upload(NEW), 503, "not_ready")


@pytest.mark.parametrize("num_left", [0, 1000, 200_000])
async def test_a_full_disk(service: Service, num_left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the new weights, and in the end for the old ones."""
    pwrite = os.pwrite

    def nearly_full(fd: int, block: memoryview, start: int) -> int:
        nonlocal num_left
        if not num_left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        num_written = pwrite(fd, block[:num_left], start)
        num_left -= num_written
        return num_written

    what = "old" if num_left == 200_000 else "new"
    async with Unchanged(service):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", nearly_full)
            refused = await service.upload(NEW)
        detail = problem(refused, 507, "storage")["detail"]
    assert detail == f"the {what} weights cannot be kept in staging_dir: No space left on device"
    done(await service.upload(NEW))


@pytest.mark.parametrize(("name", "reason"), [("none", "No such file"), ("file", "Not a directory")])
async def test_no_directory_for_weights(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    async with updatable(staging_dir=tmp_path / name) as service:
        async with Unchanged(service):
            refused = await service.upload(NEW)
        failed = {"source": "upload", "outcome": "failed"}
        assert await metric(service.http, "shopr1_policy_updates_total", **failed) == 1
    assert reason in problem(refused, 507, "storage")["detail"]


# --- senders that go --------------------------------------------------------------------------------


async def _put(service: Service, content: bytes, cut: int) -> list[dict[str, Any]]:
    """An upload whose client goes after so many bytes, as a server tells it."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": content[:cut], "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "PUT",
        "scheme": "http",
        "path": "/policy/weights",
        "raw_path": b"/policy/weights",
        "query_string": b"version=gone",
        "root_path": "",
        "headers": [(b"content-length", str(len(content)).encode())],
        "server": ("test", 80),
        "client": ("test", 1),
    }
    await service.app(scope, receive, send)
    return sent


@pytest.mark.parametrize("cut", [0, 4, 1000, len(NEW) // 2, len(NEW) - 1, len(NEW)])
async def test_a_client_that_disconnects_leaves_no_trace(service: Service, cut: int) -> None:
    async with Unchanged(service):
        sent = await _put(service, NEW, cut)
    assert sent[0]["status"] == 499
    assert await metric(service.http, "shopr1_policy_updates_total", source="upload", outcome="failed") == 1
    done(await service.upload(NEW))


async def test_many_failures_leave_no_open_files(service: Service) -> None:
    done(await service.upload(NEW))
    before = staged_files()
    for _ in range(10):
        await _put(service, NEW, 5000)
        problem(await service.upload(NEW[:-1]), 422, "invalid_weights")
        problem(await service.upload(INFINITE), 422, "invalid_weights")
        assert flaws(await service.upload(file_of({"x": torch.zeros(1)}), partial=True)).keys() == {"x"}
        done(await service.upload(NEW))
        assert len(staged_files() - before) == 1  # the backup: the last one that succeeded


# --- names of checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["update", "sglang", "upload"])
async def test_a_tensor_for_each_expert_by_every_way(route: str, tmp_path: Path) -> None:
    """`save_pretrained` of a mixture, whose experts the model stacks."""
    options: dict[str, Any] = {"kind": "mixtral", **MIXTURES["mixtral"].options}
    sent = changed_model(**options)
    saved(tmp_path / "new", sent)
    tensors = safetensors.torch.load_file(tmp_path / "new" / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in tensors
    async with updatable(tiny_model(**options), policy_roots=(tmp_path,)) as service:
        await send(service, route, tmp_path / "new")
        assert await service.numbers() == await numbers_of(sent)
        async with Unchanged(service):  # the stacked tensors are their own backup
            infinite = {**tensors, HEAD: torch.full((389, 32), HUGE)}
            problem(await service.upload(file_of(infinite)), 422, "invalid_weights")
        done(await service.upload(file_of(tiny_model(**options)), "2"))  # a state dict
        service.forget_prompts()
        assert await service.numbers() == await numbers_of(tiny_model(**options))


async def send(service: Service, route: str, path: Path) -> None:
    match route:
        case "update":
            done(await service.update(str(path)))
        case "sglang":
            done(await service.http.post("/update_weights_from_disk", json={"model_path": str(path)}))
        case _:
            done(await service.upload((path / "model.safetensors").read_bytes()))


@pytest.mark.parametrize("transport", ["http", "gloo"])
def test_a_tensor_for_each_expert_from_a_client(transport: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": "olmoe", **MIXTURES["olmoe"].options}
    sent, policy = changed_model(**options), policy_of(tiny_model(**options))
    sent.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in tensors
    with served(policy) as url, Client(url, timeout_s=WAIT_S) as client:
        client.update_policy(tensors, "1", transport=transport, host="127.0.0.1")
        assert client.policy().base.version == "1"
    check_equal(policy.model, sent)


@pytest.mark.parametrize("name", MULTIMODAL)
async def test_a_multimodal_directory(name: str, tmp_path: Path) -> None:
    whole = MULTIMODAL[name]()
    old = saved(tmp_path / "old", whole)
    new = saved(tmp_path / "new", changed(whole))
    tokenizer: Any = AutoTokenizer.from_pretrained(old)  # transformers has one of its own for some models
    async with updatable(AutoModelForCausalLM.from_pretrained(new), tokenizer) as started:
        expected = await started.numbers()
    policy = AutoModelForCausalLM.from_pretrained(old)
    async with updatable(policy, tokenizer, policy_roots=(tmp_path,)) as service:
        done(await service.update("new"))
        assert await service.numbers() == expected
