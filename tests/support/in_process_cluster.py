"""A journal and its engines in one process, which talk as they do through Ray: everything is pickled."""

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
from shopr1_service.cluster.messages import raised
from shopr1_service.cluster.routing_view import Route, View
from shopr1_service.cluster.update_coordinator import GRACE_S, UpdateCoordinator
from shopr1_service.cluster.update_log import Change
from shopr1_service.core import Certainty, Kind, MeasuredCompletion, Measurements, Target, TokenGroup
from shopr1_service.settings import Settings
from tests.support.broken_updates import ADAPTER_CONFIG
from tests.support.models import policy_of, random_ids, tiny_model

RULES = load_recipe("shop_r1").self_certainty
GROUP = TokenGroup(random_ids(40), [MeasuredCompletion(random_ids(9, seed=1), range(9))])


class Handle:
    """Of something in this process, as Ray's are."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self._calls: set[asyncio.Task[Any]] = set()
        self._death = asyncio.Event()

    def replace(self, target: Any) -> None:
        """What was there dies, and another one comes in its place."""
        if (life := self.target._roster._life) is not None:
            life.cancel()
        self._death.set()
        self._death = asyncio.Event()
        self.target = target

    async def close(self) -> None:
        """End what has been asked and not answered."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        if (life := self.target._roster._life) is not None:
            life.cancel()

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
    """Engines of a tiny model by their names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, *, is_rolling: bool = False) -> None:
        self.settings = Settings(policy_roots=(directory,), staging_dir=directory, max_adapters=2)
        self.dead: set[str] = set()
        self.engines: dict[str, EngineReplica] = {}
        self._is_rolling = is_rolling
        self.journal = Handle(self.new_journal(grace_s=0.0))
        monkeypatch.setattr(module, "load_policy", lambda _settings: policy_of(tiny_model()))

    def new_journal(self, grace_s: float = GRACE_S) -> UpdateCoordinator:
        directory, is_rolling = self.settings.staging_dir, self._is_rolling
        return UpdateCoordinator(directory, is_rolling=is_rolling, lives=self._lives, grace_s=grace_s)

    async def _lives(self, actor: Any) -> bool:
        return actor not in self.dead

    def engine(self, name: str) -> EngineReplica:
        """One that has not asked the journal for anything."""
        self.engines[name] = EngineReplica(self.settings.model_dump(), name)
        return self.engines[name]

    async def start(self, *names: str) -> None:
        for name in names:
            await self.engine(name).join(self.journal, name)

    async def kill(self, name: str) -> None:
        engine = self.engines.pop(name)
        self.dead.add(name)
        if engine._following is not None:
            engine._following.cancel()
        engine._scheduler.close()

    async def change(self, change: Change) -> Any:
        return raised(await self.journal.change.remote(change))

    async def update(self, path: str, version: str, *, partial: bool = False) -> PolicyUpdate:
        update = await self.change(Change(UpdateRequest(path=path, version=version, partial=partial)))
        assert isinstance(update, PolicyUpdate)
        return update

    async def upload(self, content: bytes) -> str:
        upload: str = raised(await self.journal.begin.remote())
        for start in range(0, len(content), 5000):
            raised(await self.journal.append.remote(upload, content[start : start + 5000]))
        return upload

    async def load_adapter(self, name: str, content: bytes, **fields: Any) -> Any:
        request = AdapterRequest(name=name, path="-", **fields)
        return await self.change(Change(request, await self.upload(content), ADAPTER_CONFIG.encode()))

    async def view(self) -> View:
        view: View | None = await self.journal.view.remote()
        assert view is not None
        return view

    async def until_ready(self, *names: str) -> View:
        """As soon as these are in rotation, and no others."""
        view = await self.view()
        while set(view.engines) != set(names):
            view = await self.after(view)
        return view

    async def after(self, view: View) -> View:
        """The next one, or, if nothing happens for some time, the same."""
        seen: View | None = await self.journal.view.remote(view.revision)
        return seen or view


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
        await cluster.journal.close()


async def measured(engine: EngineReplica, route: Route | None = None, **target: Any) -> Any:
    """What an engine says to a piece of work, always the same one."""
    return await engine.measure(GROUP, Kind(RULES, Target(**target)), route or Route())


@dataclass(frozen=True, eq=False)
class Values:
    """Equal if they are close: what was kept from before changes the last bits."""

    nats: Sequence[float]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self.nats == pytest.approx(other.nats, rel=0, abs=1e-5)


async def numbers(engine: EngineReplica, **target: Any) -> tuple[Values, str, int]:
    """Values, and name and number of the version that they are of."""
    outcome = await measured(engine, **target)
    assert isinstance(outcome, Measurements), outcome
    [certainty] = outcome.values
    assert isinstance(certainty, Certainty)
    return Values(certainty.values), outcome.version.name, outcome.version.number
