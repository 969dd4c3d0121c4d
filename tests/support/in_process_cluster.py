"""An update coordinator and its engines in one process. Calls and results are pickled, as Ray does."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shopr1_client.wire_policy import AdapterRequest, PolicyUpdate, UpdateRequest
from shopr1_rewards import load_recipe
from shopr1_service.cluster import engine_replica as module
from shopr1_service.cluster.engine_replica import EngineReplica
from shopr1_service.cluster.messages import ClusterView, Route, raise_problem
from shopr1_service.cluster.update_coordinator import GRACE_S, UpdateCoordinator
from shopr1_service.cluster.update_log import Change
from shopr1_service.core import (
    BatchKey,
    Certainty,
    CompletionTokens,
    GroupCertainties,
    PromptKey,
    Target,
    TokenGroup,
)
from shopr1_service.settings import Settings
from tests.support.broken_updates import ADAPTER_CONFIG
from tests.support.models import policy_of, random_ids, tiny_model

RULES = load_recipe("shop_r1").self_certainty
GROUP = TokenGroup(PromptKey(random_ids(40)), [CompletionTokens(random_ids(9, seed=1), range(9))])
_CHUNK_BYTES = 5000


class Handle:
    """A handle like Ray's, of an object in this process."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self._calls: set[asyncio.Task[Any]] = set()
        self._death = asyncio.Event()

    def replace(self, target: Any) -> None:
        """Let the object die, with its open calls, and put another one in its place."""
        self.target._members.close()
        self._death.set()
        self._death = asyncio.Event()
        self.target = target

    async def close(self) -> None:
        """Cancel all open calls."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        self.target._members.close()

    def call(self, name: str, sent: bytes) -> "asyncio.Task[Any]":
        call = asyncio.create_task(self._call(name, sent))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    async def _call(self, name: str, sent: bytes) -> Any:
        args, kwargs = pickle.loads(sent)
        answer = asyncio.create_task(getattr(self.target, name)(*args, **kwargs))
        death = asyncio.create_task(self._death.wait())
        try:
            await asyncio.wait({answer, death}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ConnectionError("the actor has died")
            return pickle.loads(pickle.dumps(answer.result()))
        finally:
            answer.cancel()
            death.cancel()

    def __getattr__(self, name: str) -> "_Method":
        return _Method(self, name)


class _Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self._handle = handle
        self._name = name

    def remote(self, *args: Any, **kwargs: Any) -> "asyncio.Task[Any]":
        return self._handle.call(self._name, pickle.dumps((args, kwargs)))


class Cluster:
    """A coordinator, and engines of a tiny model by their names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, *, is_rolling: bool = False) -> None:
        self.settings = Settings(policy_roots=(directory,), staging_dir=directory, max_adapters=2)
        self.dead: set[str] = set()
        self.engines: dict[str, EngineReplica] = {}
        self._is_rolling = is_rolling
        self.coordinator = Handle(self.new_coordinator(grace_s=0.0))
        monkeypatch.setattr(module, "load_policy", lambda _settings: policy_of(tiny_model()))

    def new_coordinator(self, grace_s: float = GRACE_S) -> UpdateCoordinator:
        directory, is_rolling = self.settings.staging_dir, self._is_rolling
        return UpdateCoordinator(directory, is_rolling=is_rolling, is_alive=self._is_alive, grace_s=grace_s)

    async def _is_alive(self, actor: Any) -> bool:
        return actor not in self.dead

    def engine(self, name: str) -> EngineReplica:
        """A new engine that has not polled the coordinator yet."""
        self.engines[name] = EngineReplica(self.settings.model_dump(), name)
        return self.engines[name]

    async def start(self, *names: str) -> None:
        for name in names:
            await self.engine(name).join(self.coordinator, name)

    async def kill(self, name: str) -> None:
        engine = self.engines.pop(name)
        self.dead.add(name)
        if engine._following is not None:
            engine._following.cancel()
        engine._engine.scheduler.close()

    async def change(self, change: Change) -> Any:
        return raise_problem(await self.coordinator.change.remote(change))

    async def update(self, path: str, version: str, *, partial: bool = False) -> PolicyUpdate:
        update = await self.change(Change(UpdateRequest(path=path, version=version, partial=partial)))
        assert isinstance(update, PolicyUpdate)
        return update

    async def upload(self, content: bytes) -> str:
        upload: str = raise_problem(await self.coordinator.create_upload.remote())
        for start in range(0, len(content), _CHUNK_BYTES):
            chunk = content[start : start + _CHUNK_BYTES]
            raise_problem(await self.coordinator.append.remote(upload, chunk))
        return upload

    async def load_adapter(self, name: str, content: bytes, **fields: Any) -> Any:
        request = AdapterRequest(name=name, path="-", **fields)
        return await self.change(Change(request, await self.upload(content), ADAPTER_CONFIG.encode()))

    async def view(self) -> ClusterView:
        view: ClusterView | None = await self.coordinator.view.remote()
        assert view is not None
        return view

    async def next_view(self, view: ClusterView) -> ClusterView:
        """The view after this one; the same, if nothing changes for some time."""
        seen: ClusterView | None = await self.coordinator.view.remote(view.revision)
        return seen or view

    async def until_ready(self, *names: str) -> ClusterView:
        """Wait until these engines are ready, and no others."""
        view = await self.view()
        while set(view.engines) != set(names):
            view = await self.next_view(view)
        return view


@asynccontextmanager
async def running(
    monkeypatch: pytest.MonkeyPatch, directory: Path, *names: str, is_rolling: bool = False
) -> AsyncIterator[Cluster]:
    cluster = Cluster(monkeypatch, directory, is_rolling=is_rolling)
    try:
        await cluster.start(*names)
        if names:
            await cluster.until_ready(*names)
        yield cluster
    finally:
        for name in list(cluster.engines):
            await cluster.kill(name)
        await cluster.coordinator.close()


async def measured(engine: EngineReplica, route: Route | None = None, **target: Any) -> Any:
    """An engine's answer to a group, always the same one."""
    return await engine.compute_certainties(GROUP, BatchKey(RULES, Target(**target)), route or Route())


@dataclass(frozen=True, eq=False)
class Values:
    """Values that are equal if they are close: the prefix cache changes the last bits."""

    nats: Sequence[float]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self.nats == pytest.approx(other.nats, rel=0, abs=1e-5)


async def numbers(engine: EngineReplica, **target: Any) -> tuple[Values, str, int]:
    """Values of `GROUP`, and name and number of the version that computed them."""
    outcome = await measured(engine, **target)
    assert isinstance(outcome, GroupCertainties), outcome
    [certainty] = outcome.values
    assert isinstance(certainty, Certainty)
    return Values(certainty.values), outcome.version.name, outcome.version.number


async def agree(cluster: Cluster, **target: Any) -> tuple[Values, str, int]:
    """`numbers` of all engines, after a check that all have the same numbers and tables."""
    first, *others = [await numbers(engine, **target) for engine in cluster.engines.values()]
    assert all(other == first for other in others)
    tables = [engine._engine.policy.versions for engine in cluster.engines.values()]
    assert all(table == tables[0] for table in tables)
    return first
