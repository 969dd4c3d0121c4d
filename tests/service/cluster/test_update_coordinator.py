"""Engines that follow one journal: a change is made by all of them or by none, whoever fails or dies."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shopr1_client.errors import (
    InvalidWeightsError,
    NotFoundError,
    NotReadyError,
    PolicyVersionError,
    UpdateConflictError,
)
from shopr1_client.wire_policy import UpdateRequest, VersionDemand
from shopr1_service.cluster.engine_replica import EngineFailedError
from shopr1_service.cluster.routing_view import Elsewhere, Route
from shopr1_service.cluster.update_follower import BehindError
from shopr1_service.cluster.update_log import Change, Unloading
from shopr1_service.core import Target, Version
from shopr1_service.weights.staging import StagedWeights
from tests.support.http import WAIT_S
from tests.support.in_process_cluster import Cluster, measured, numbers, running
from tests.support.updating import PART, adapter_file, changed_model, file_of, saved, weights_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(WAIT_S)]

NEW = changed_model(1)
NEWER = changed_model(2)


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(monkeypatch, tmp_path, "a", "b") as cluster:
        yield cluster


async def agree(cluster: Cluster, **target: Any) -> tuple[Any, str, int]:
    """What all engines say, which is the same."""
    first, *others = [await numbers(engine, **target) for engine in cluster.engines.values()]
    assert all(other == first for other in others)
    tables = [engine._policy.versions for engine in cluster.engines.values()]
    assert all(table == tables[0] for table in tables)
    return first


# --- changes ----------------------------------------------------------------------------------------


async def test_all_engines_take_a_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    before, *_ = await agree(cluster)
    update = await cluster.update(saved(tmp_path / "new", NEW), "x")
    assert (update.former.version, update.current.version, update.current.number) == ("0", "x", 1)
    after = await agree(cluster)
    assert after[1:] == ("x", 1)
    assert after[0] != before
    view = await cluster.view()
    assert (view.floor, view.engines, view.table.base.name) == (1, {"a": 1, "b": 1}, "x")


async def test_all_engines_take_an_upload(cluster: Cluster) -> None:
    upload = await cluster.upload(file_of(NEW))
    await cluster.change(Change(UpdateRequest(path="-", version="x"), upload))
    assert (await agree(cluster))[1:] == ("x", 1)


async def test_adapters_come_and_go_everywhere(cluster: Cluster) -> None:
    base, *_ = await agree(cluster)
    for seed in (4, 5, 6):
        await cluster.load_adapter("lora", adapter_file(seed, config=None), default=seed == 5)
    own = await agree(cluster)
    assert own[1:] == ("3", 3)
    assert own[0] != base
    older = await agree(cluster, adapter="lora", demand=VersionDemand(exact="2"))
    assert older[0] != own[0]
    await cluster.change(Change(Unloading("lora", "3")))
    assert await agree(cluster) == older
    with pytest.raises(NotFoundError):
        await cluster.change(Change(Unloading("other", None)))
    await cluster.change(Change(Unloading("lora", None)))
    assert (await agree(cluster))[0] == base


async def test_what_one_engine_refuses_no_engine_takes(cluster: Cluster, tmp_path: Path) -> None:
    before = await agree(cluster)
    broken = weights_of(NEW)
    broken["model.norm.weight"][0] = float("nan")
    upload = await cluster.upload(file_of(broken))
    with pytest.raises(InvalidWeightsError, match="NaN"):
        await cluster.change(Change(UpdateRequest(path="-", version="x"), upload))
    with pytest.raises(InvalidWeightsError, match="nothing of this name"):
        await cluster.update("nowhere", "x")
    assert await agree(cluster) == before
    with pytest.raises(NotFoundError):  # nothing is kept of it
        await cluster.journal.target._uploads.read(upload, 0, 1)
    assert (await cluster.update(saved(tmp_path / "new", NEW), "x")).current.number == 1


async def test_one_change_at_a_time(cluster: Cluster, tmp_path: Path) -> None:
    path = saved(tmp_path / "new", NEW)
    first = asyncio.create_task(cluster.update(path, "x"))
    view = await cluster.view()
    while view.progress is None:
        view = await cluster.after(view)
    with pytest.raises(UpdateConflictError, match="'x' is under way") as caught:
        await cluster.update(path, "y")
    assert caught.value.retry_after_s
    with pytest.raises(UpdateConflictError):
        await cluster.upload(b"")
    await first


async def test_it_goes_on_when_whoever_asked_is_gone(cluster: Cluster, tmp_path: Path) -> None:
    update = asyncio.create_task(cluster.update(saved(tmp_path / "new", NEW), "x"))
    view = await cluster.view()
    while view.progress is None:
        view = await cluster.after(view)
    update.cancel()
    while view.floor < 1:
        view = await cluster.after(view)
    assert (await agree(cluster))[1:] == ("x", 1)


async def test_rolling_one_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with running(monkeypatch, tmp_path, "a", "b", "c", is_rolling=True) as cluster:
        path, seen = saved(tmp_path / "new", NEW), []
        update = asyncio.create_task(cluster.update(path, "x"))
        while not update.done():
            seen.append(sorted(engine._policy.versions.num_changes for engine in cluster.engines.values()))
            # Engines whose weights are on their way while the others still serve the old ones.
            busy = [name for name, engine in cluster.engines.items() if engine._updates.progress]
            assert len(busy) <= 1
            await asyncio.sleep(0)
        await update
    assert [0, 0, 1] in seen
    assert [0, 1, 1] in seen


# --- who may answer ---------------------------------------------------------------------------------


async def test_a_demanded_version_goes_to_those_that_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with running(monkeypatch, tmp_path, "a", "b", is_rolling=True) as cluster:
        new, old = Target(demand=VersionDemand(at_least="x")), Target(demand=VersionDemand(exact="0"))
        holders = []
        update = asyncio.create_task(cluster.update(saved(tmp_path / "new", NEW), "x"))
        view = await cluster.view()
        while view.floor == 0:
            holders.append((view.holders(old), view.holders(new)))
            view = await cluster.after(view)
        await update
        assert holders[0] == (frozenset("ab"), frozenset())
        assert (frozenset("b"), frozenset("a")) in holders
        assert (view.holders(old), view.holders(new)) == (frozenset(), frozenset("ab"))
        refused = await measured(cluster.engines["a"], demand=VersionDemand(exact="0"))
        assert isinstance(refused, Elsewhere)
        assert isinstance(refused.problem, PolicyVersionError)


async def test_an_engine_that_is_behind_does_not_answer(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.update(saved(tmp_path / "new", NEW), "x")
    late = cluster.engine("late")
    floor = (await cluster.view()).floor
    refused = await measured(late, Route(floor=floor))
    assert isinstance(refused, Elsewhere)
    await late.join(cluster.journal, "late")
    assert (await agree(cluster))[1:] == ("x", 1)


# --- engines that start late, fail or die -----------------------------------------------------------


async def test_a_late_engine_is_where_the_others_are_before_it_is_ready(
    cluster: Cluster, tmp_path: Path
) -> None:
    await cluster.update(saved(tmp_path / "old", NEWER), "w")
    await cluster.update(saved(tmp_path / "new", NEW), "x")
    upload = await cluster.upload(file_of(weights_of(NEWER, PART)))
    await cluster.change(Change(UpdateRequest(path="-", version="y", partial=True), upload))
    await cluster.load_adapter("lora", adapter_file(4, config=None), version="z")
    await cluster.start("late")
    assert (await agree(cluster))[1:] == ("y", 3)
    assert (await agree(cluster, adapter="lora"))[1:] == ("z", 4)
    await cluster.until_ready("a", "b", "late")
    assert (await cluster.update(saved(tmp_path / "newest", NEWER), "last")).current.number == 5
    assert (await agree(cluster))[1:] == ("last", 5)


async def test_an_engine_that_cannot_follow_is_out_of_rotation(cluster: Cluster, tmp_path: Path) -> None:
    """The checkpoint is another one when its turn comes."""
    path = saved(tmp_path / "new", NEW)
    second = cluster.engines["b"]
    original = second._updates._open

    def read(path: str, staged: StagedWeights) -> None:
        saved(Path(path), NEWER)
        original(path, staged)

    second._updates._open = read  # type: ignore[method-assign]
    await cluster.update(path, "x")
    view = await cluster.until_ready("a")
    assert view.floor == 1
    refused = await measured(second, Route(floor=view.floor))
    assert isinstance(refused, Elsewhere)
    with pytest.raises(EngineFailedError, match="change 1 cannot be made here: the checkpoint was writ"):
        await second.check_health()
    with pytest.raises(BehindError):  # nor can its successor
        await cluster.start("c")
    del cluster.engines["b"], cluster.engines["c"]
    await cluster.update(path, "y")
    await cluster.start("d")
    assert (await agree(cluster))[1:] == ("y", 2)


async def test_an_engine_that_never_gets_a_checkpoint_read_is_out_of_rotation(
    cluster: Cluster, tmp_path: Path
) -> None:
    second, is_over = cluster.engines["b"], threading.Event()
    second._updates._read_timeout_s = 0.05
    second._updates._open = lambda *_: is_over.wait(WAIT_S)  # type: ignore[assignment, method-assign]
    try:
        await cluster.update(saved(tmp_path / "new", NEW), "x")
        assert (await cluster.until_ready("a")).engines == {"a": 1}
        with pytest.raises(EngineFailedError, match="have not been read within read_timeout_s"):
            await second.check_health()
    finally:
        is_over.set()


async def test_an_engine_that_dies_of_a_change_takes_nobody_with_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shopr1_service.cluster.membership._LIFE_S", 0.01)

    async def hang(*_: object) -> None:
        await cluster.kill("a")
        await asyncio.Event().wait()

    cluster.engines["a"]._updates.from_checkpoint = hang  # type: ignore[assignment, method-assign]
    with pytest.raises(NotReadyError, match="the engine that tried it has died"):
        await cluster.update(saved(tmp_path / "new", NEW), "x")
    assert (await agree(cluster))[1:] == ("0", 0)
    await cluster.update(str(tmp_path / "new"), "x")
    assert (await agree(cluster))[1:] == ("x", 1)


async def test_an_update_does_not_wait_for_the_dead(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shopr1_service.cluster.membership._LIFE_S", 0.01)
    await cluster.kill("b")
    await cluster.update(saved(tmp_path / "new", NEW), "x")
    assert (await cluster.view()).engines == {"a": 1}


async def test_no_engine_no_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with running(monkeypatch, tmp_path) as cluster:
        with pytest.raises(NotReadyError, match="no engine is ready"):
            await cluster.update("x", "x")


async def test_an_engine_does_not_go_by_a_table_of_what_it_has_not(cluster: Cluster) -> None:
    await cluster.load_adapter("lora", adapter_file(4, config=None))
    policy, before = cluster.engines["a"]._policy, cluster.engines["a"]._policy.versions
    other = before.with_adapter(Version("x", 9, "lora"), max_kept=2, is_default=True)
    for table in (other, before.with_base("x", 0.0)):
        with pytest.raises(ValueError, match="its versions are"):
            policy.sync_versions(table)
    assert policy.versions is before
    policy.sync_versions(before)


# --- the journal dies -------------------------------------------------------------------------------


async def test_the_next_journal_learns_from_the_engines(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.update(saved(tmp_path / "new", NEW), "x")
    cluster.journal.replace(cluster.new_journal())
    await cluster.start("late")
    assert (await agree(cluster))[1:] == ("x", 1)
    view = await cluster.view()
    assert (view.floor, view.table.base.name) == (1, "x")
    await cluster.update(saved(tmp_path / "newer", NEWER), "y")
    assert (await agree(cluster))[1:] == ("y", 2)


async def test_uploads_go_with_the_journal(cluster: Cluster, tmp_path: Path) -> None:
    upload = await cluster.upload(file_of(NEW))
    await cluster.change(Change(UpdateRequest(path="-", version="x"), upload))
    cluster.journal.replace(cluster.new_journal())
    late = cluster.engine("late")
    with pytest.raises(BehindError, match="the upload is not kept any more"):
        await late.join(cluster.journal, "late")
    await cluster.kill("late")
    await cluster.until_ready("a", "b")
    await cluster.update(saved(tmp_path / "new", NEWER), "y")
    await cluster.start("later")
    assert (await agree(cluster))[1:] == ("y", 2)


async def test_an_engine_with_a_change_of_its_own_begins_anew(cluster: Cluster, tmp_path: Path) -> None:
    """The journal died when one engine had tried it, and nobody had heard of that."""
    lone = cluster.engine("lone")
    await lone._updates.from_checkpoint(UpdateRequest(path=saved(tmp_path / "new", NEW), version="x"))
    with pytest.raises(BehindError, match="a change that the others have not"):
        await lone.join(cluster.journal, "lone")
