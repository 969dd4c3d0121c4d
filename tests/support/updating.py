"""A service whose policy changes: what is sent to it, and what its numbers are held against."""

import contextlib
import os
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import safetensors.torch
import torch
from fastapi import FastAPI
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shopr1_client.wire import ScoreRequest
from shopr1_client.wire_policy import ADAPTER_CONFIG_KEY
from shopr1_service.core import Origin
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from shopr1_service.updates.updatable_engine import UpdatableEngine
from shopr1_service.weights.files import CLOSE_THREAD
from tests.support.adapters import random_tensors
from tests.support.broken_updates import ADAPTER_CONFIG
from tests.support.http import CLICK, answer, client_of, group, problem, score, until_ready
from tests.support.models import byte_level, policy_of, tiny_model

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
PART = "model.layers.1."
"""Tensors of a partial update."""
HUGE = 1e38

_PAGE = "A shop for tea and mugs. What next?"
_GROUPS = [
    group(answer(), answer(CLICK, "The blue mug is cheaper."), prompt=_PAGE),
    group(answer(rationale="3 € is too much"), prompt=f"{_PAGE} Page 12"),
]


# --- weights ----------------------------------------------------------------------------------------


def changed_model(seed: int = 1, prefix: str = "", **options: Any) -> PreTrainedModel:
    """`tiny_model`, with random numbers on the weights whose names begin so."""
    return changed(tiny_model(**options), seed, prefix)


@torch.no_grad()
def changed(model: PreTrainedModel, seed: int = 1, prefix: str = "") -> PreTrainedModel:
    """The model itself, with random numbers on the weights whose names begin so."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = 0.3 * torch.randn(tensor.shape, generator=generator)
        if name.startswith(prefix):
            tensor.add_(noise.to(tensor.dtype))
    return model


def weights_of(model: PreTrainedModel, prefix: str = "") -> dict[str, Tensor]:
    """Copies, under all names that begin so."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(prefix)}


def file_of(weights: Mapping[str, Tensor] | PreTrainedModel, **metadata: str) -> bytes:
    """As a safetensors file."""
    tensors = weights_of(weights) if isinstance(weights, PreTrainedModel) else dict(weights)
    return safetensors.torch.save(tensors, metadata or None)


def saved(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **options: Any,
) -> str:
    """A checkpoint as trainers leave it; its path."""
    model.save_pretrained(directory, **options)
    (tokenizer or byte_level()).save_pretrained(directory)
    return str(directory)


def adapter_file(seed: int = 4, config: str | None = ADAPTER_CONFIG) -> bytes:
    """LoRA weights for every linear layer of `tiny_model`."""
    metadata = {} if config is None else {ADAPTER_CONFIG_KEY: config}
    return file_of(random_tensors(tiny_model(), seed=seed), **metadata)


def saved_adapter(directory: Path, seed: int = 4) -> str:
    """The same as PEFT saves it."""
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(adapter_file(seed, config=None))
    (directory / "adapter_config.json").write_text(ADAPTER_CONFIG)
    return str(directory)


# --- the service ------------------------------------------------------------------------------------


@dataclass
class Service:
    """A ready application, and the error with which it stopped."""

    app: FastAPI
    http: httpx.AsyncClient
    policy: LoadedPolicy
    failures: list[BaseException] = field(default_factory=list)

    @property
    def engine(self) -> threading.Thread:
        # Not by its name: those of other tests' services may not have ended yet.
        return cast("threading.Thread", self.app.state.shopr1.engine.scheduler._thread)

    async def upload(self, content: Any, version: str = "1", **params: Any) -> httpx.Response:
        """Weights: a file, or pieces of one."""
        return await self.http.put("/policy/weights", params={"version": version, **params}, content=content)

    async def update(self, path: str, version: str = "1", **fields: Any) -> httpx.Response:
        return await self.http.post("/policy/update", json={"path": path, "version": version, **fields})

    async def upload_adapter(self, name: str, content: Any, **params: Any) -> httpx.Response:
        return await self.http.put(f"/policy/adapters/{name}", params=params, content=content)

    async def load_adapter(self, name: str, path: str, **fields: Any) -> httpx.Response:
        return await self.http.post("/policy/adapters", json={"name": name, "path": path, **fields})

    async def state(self) -> Any:
        """`GET /policy`."""
        return done(await self.http.get("/policy"))

    async def scored(self, **target: Any) -> Any:
        return await score(self.http, *_GROUPS, include=["tokens"], **target)

    def forget_prompts(self) -> None:
        """As a fresh service has none."""
        self.policy._cache.clear()

    async def numbers(self, **target: Any) -> list[float]:
        """Self-certainty of each token of some rollouts, always the same ones."""
        rewards = [r for each in (await self.scored(**target))["groups"] for r in each["rewards"]]
        return [token["value"] for reward in rewards for token in reward["details"]["tokens"]]


@contextlib.asynccontextmanager
async def updatable(
    model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any
) -> AsyncIterator[Service]:
    """A service of a model in memory, which is changed; default: `tiny_model`."""
    policy = policy_of(model or tiny_model(), tokenizer, **settings)
    failures: list[BaseException] = []
    app = create_app(Settings(**settings), UpdatableEngine.opener(lambda: policy), failures.append)
    async with app.router.lifespan_context(app), client_of(app) as client:
        await until_ready(client)
        service = Service(app, client, policy, failures)
        # The first computation of a size in a process may differ from later ones in the last bit, with some
        # libraries on some processors. Not over HTTP: requests are counted, and may need keys.
        await app.state.shopr1.scorer.score(
            ScoreRequest.model_validate({"groups": _GROUPS}), Origin("warm-up")
        )
        service.forget_prompts()
        yield service


async def numbers_of(model: PreTrainedModel) -> list[float]:
    """The same of a service that has been started with this model."""
    async with updatable(model) as service:
        return await service.numbers()


def done(response: httpx.Response) -> Any:
    """The body of an answer that must be a success."""
    assert response.status_code == 200, response.text
    return response.json()


def flaws(response: httpx.Response, status: int = 422, code: str = "invalid_weights") -> dict[str, str]:
    """Messages of a problem, by location."""
    return {each["location"]: each["message"] for each in problem(response, status, code)["errors"]}


class Unchanged:
    """All that a client can see of the policy, its numbers included, which nothing must have changed."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._before: list[Any] = []
        self._state: Any = None
        self._files: set[str] = set()

    async def __aenter__(self) -> None:
        self._service.forget_prompts()
        # Kept prompts change the last bits: without them, with some, and with all of them.
        self._before = [await self._scored() for _ in range(3)]
        self._state = await self._service.state()
        self._files = staged_files()

    async def __aexit__(self, error: Any, *_: Any) -> None:
        if error is not None:
            return
        assert not staged_files() - self._files
        assert await self._service.state() == self._state
        # Here prompts may be kept that were computed of what was refused.
        assert await self._scored() in self._before
        self._service.forget_prompts()
        assert await self._scored() == self._before[0]

    async def _scored(self) -> Any:
        scored = await self._service.scored()
        del scored["request_id"]
        return scored


def staged_files() -> set[str]:
    """The private files that are open; no two ever have the same name."""
    for thread in threading.enumerate():
        if thread.name == CLOSE_THREAD:
            thread.join()
    files = map(_file_of, os.listdir("/proc/self/fd"))  # noqa: PTH208
    return {file for file in files if "/shopr1-" in file}


def _file_of(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115  # not every one is a path
    except FileNotFoundError:  # it was closed meanwhile
        return ""
