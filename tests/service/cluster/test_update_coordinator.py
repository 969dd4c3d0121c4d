"""Engines with one update coordinator: all of them apply a change or none does, whichever fails or dies."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shopr1_client.errors import (
    InvalidWeightsError,
    NotFoundError,
    NotReadyError,
    PolicyVersionError,
    UpdateConflictError,
)
from shopr1_client.wire_policy import UpdateRequest, VersionDemand
from shopr1_service.cluster.messages import BehindError, Declined
from shopr1_service.cluster.update_log import Change, UnloadRequest
from shopr1_service.core import Target
from tests.support.http import WAIT_S
from tests.support.in_process_cluster import Cluster, agree, measured, running
from tests.support.updating import adapter_file, changed_model, file_of, saved, weights_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(WAIT_S)]

NEW = changed_model(1)
NEWER = changed_model(2)


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(monkeypatch, tmp_path, "a", "b") as cluster:
        yield cluster


# --- changes ----------------------------------------------------------------------------------------


async def test_all_engines_load_a_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    before, *_ = await agree(cluster)
    update = await cluster.update(saved(tmp_path / "new", NEW), "x")
    assert (update.former.version, update.current.version, update.current.number) == ("0", "x", 1)
    after = await agree(cluster)
    assert after[1:] == ("x", 1)
    assert after[0] != before
    view = await cluster.view()
    assert (view.min_number, view.engines, view.table.base.name) == (1, {"a": 1, "b": 1}, "x")


async def test_all_engines_load_an_upload(cluster: Cluster) -> None:
    upload = await cluster.upload(file_of(NEW))
    await cluster.change(Change(UpdateRequest(path="-", version="x"), upload))
    assert (await agree(cluster))[1:] == ("x", 1)


async def test_all_engines_load_and_unload_adapters(cluster: Cluster) -> None:
    base, *_ = await agree(cluster)
    for seed in (4, 5, 6):
        await cluster.load_adapter("lora", adapter_file(seed, config=None), default=seed == 5)
    own = await agree(cluster)
    assert own[1:] == ("3", 3)
    assert own[0] != base
    older = await agree(cluster, adapter="lora", demand=VersionDemand(exact="2"))
    assert older[0] != own[0]
    await cluster.change(Change(UnloadRequest("lora", "3")))
    assert await agree(cluster) == older
    with pytest.raises(NotFoundError):
        await cluster.change(Change(UnloadRequest("other")))
    await cluster.change(Change(UnloadRequest("lora")))
    assert (await agree(cluster))[0] == base


async def test_a_change_that_the_canary_refuses_is_applied_nowhere(cluster: Cluster, tmp_path: Path) -> None:
    before = await agree(cluster)
    broken = weights_of(NEW)
    broken["model.norm.weight"][0] = float("nan")
    upload = await cluster.upload(file_of(broken))
    with pytest.raises(InvalidWeightsError, match="NaN"):
        await cluster.change(Change(UpdateRequest(path="-", version="x"), upload))
    with pytest.raises(InvalidWeightsError, match="no directory of this name"):
        await cluster.update("nowhere", "x")
    assert await agree(cluster) == before
    with pytest.raises(NotFoundError):  # the upload is deleted
        await cluster.coordinator.target._uploads.read(upload, 0, 1)
    assert (await cluster.update(saved(tmp_path / "new", NEW), "x")).current.number == 1


async def test_one_change_at_a_time(cluster: Cluster, tmp_path: Path) -> None:
    path = saved(tmp_path / "new", NEW)
    first = asyncio.create_task(cluster.update(path, "x"))
    view = await cluster.view()
    while view.progress is None:
        view = await cluster.next_view(view)
    with pytest.raises(UpdateConflictError, match="'x' is under way") as caught:
        await cluster.update(path, "y")
    assert caught.value.retry_after_s
    with pytest.raises(UpdateConflictError):
        await cluster.upload(b"")
    await first


async def test_a_change_continues_when_the_caller_disconnects(cluster: Cluster, tmp_path: Path) -> None:
    update = asyncio.create_task(cluster.update(saved(tmp_path / "new", NEW), "x"))
    view = await cluster.view()
    while view.progress is None:
        view = await cluster.next_view(view)
    update.cancel()
    while view.min_number < 1:
        view = await cluster.next_view(view)
    assert (await agree(cluster))[1:] == ("x", 1)


async def test_a_rolling_update_changes_one_engine_after_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with running(monkeypatch, tmp_path, "a", "b", "c", is_rolling=True) as cluster:
        path, seen = saved(tmp_path / "new", NEW), []
        update = asyncio.create_task(cluster.update(path, "x"))
        while not update.done():
            seen.append(
                sorted(engine._engine.policy.versions.num_changes for engine in cluster.engines.values())
            )
            # Engines that are loading new weights while they serve the old ones.
            busy = [name for name, engine in cluster.engines.items() if engine._engine.weights.progress]
            assert len(busy) <= 1
            await asyncio.sleep(0)
        await update
    assert [0, 0, 1] in seen
    assert [0, 1, 1] in seen


async def test_without_engines_a_change_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with running(monkeypatch, tmp_path) as cluster:
        with pytest.raises(NotReadyError, match="no engine is ready"):
            await cluster.update("x", "x")


async def test_a_demanded_version_is_looked_for_where_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with running(monkeypatch, tmp_path, "a", "b", is_rolling=True) as cluster:
        new, old = Target(demand=VersionDemand(at_least="x")), Target(demand=VersionDemand(exact="0"))
        holders = []
        update = asyncio.create_task(cluster.update(saved(tmp_path / "new", NEW), "x"))
        view = await cluster.view()
        while view.min_number == 0:
            holders.append((view.engines_with(old), view.engines_with(new)))
            view = await cluster.next_view(view)
        await update
        assert holders[0] == (frozenset("ab"), frozenset())
        assert (frozenset("b"), frozenset("a")) in holders
        assert (view.engines_with(old), view.engines_with(new)) == (frozenset(), frozenset("ab"))
        refused = await measured(cluster.engines["a"], demand=VersionDemand(exact="0"))
        assert isinstance(refused, Declined)
        assert isinstance(refused.problem, PolicyVersionError)


# --- engines die ------------------------------------------------------------------------------------


async def test_when_the_canary_dies_nothing_changes(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shopr1_service.cluster.update_coordinator._LIVENESS_S", 0.01)

    async def hang(*_: object) -> None:
        await cluster.kill("a")
        await asyncio.Event().wait()

    cluster.engines["a"]._engine.weights.from_checkpoint = hang  # type: ignore[assignment, method-assign]
    with pytest.raises(NotReadyError, match="the engine that tried the change has died"):
        await cluster.update(saved(tmp_path / "new", NEW), "x")
    assert (await agree(cluster))[1:] == ("0", 0)
    await cluster.update(str(tmp_path / "new"), "x")
    assert (await agree(cluster))[1:] == ("x", 1)


async def test_when_the_canary_dies_after_its_trial_the_others_apply_the_change(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shopr1_service.cluster.update_coordinator._LIVENESS_S", 0.01)
    coordinator, report = cluster.coordinator.target, cluster.coordinator.target.report_trial

    async def report_and_die(engine: str, result: object) -> None:
        await report(engine, result)
        await cluster.kill(engine)

    coordinator.report_trial = report_and_die
    assert (await cluster.update(saved(tmp_path / "new", NEW), "x")).current.number == 1
    assert set(cluster.engines) == {"b"}
    assert (await agree(cluster))[1:] == ("x", 1)


async def test_an_update_does_not_wait_for_dead_engines(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shopr1_service.cluster.update_coordinator._LIVENESS_S", 0.01)
    await cluster.kill("b")
    await cluster.update(saved(tmp_path / "new", NEW), "x")
    assert (await cluster.view()).engines == {"a": 1}


# --- the coordinator dies ---------------------------------------------------------------------------


async def test_a_new_coordinator_restores_the_log_of_the_engines(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.update(saved(tmp_path / "new", NEW), "x")
    cluster.coordinator.replace(cluster.new_coordinator())
    await cluster.start("late")
    assert (await agree(cluster))[1:] == ("x", 1)
    view = await cluster.view()
    assert (view.min_number, view.table.base.name) == (1, "x")
    await cluster.update(saved(tmp_path / "newer", NEWER), "y")
    assert (await agree(cluster))[1:] == ("y", 2)


async def test_uploads_are_lost_with_the_coordinator(cluster: Cluster, tmp_path: Path) -> None:
    upload = await cluster.upload(file_of(NEW))
    await cluster.change(Change(UpdateRequest(path="-", version="x"), upload))
    cluster.coordinator.replace(cluster.new_coordinator())
    late = cluster.engine("late")
    with pytest.raises(BehindError, match="the upload is not stored any more"):
        await late.join(cluster.coordinator, "late")
    await cluster.kill("late")
    await cluster.until_ready("a", "b")
    await cluster.update(saved(tmp_path / "new", NEWER), "y")
    await cluster.start("later")
    assert (await agree(cluster))[1:] == ("y", 2)


async def test_an_engine_with_a_change_of_its_own_restarts(cluster: Cluster, tmp_path: Path) -> None:
    """The coordinator died in a trial: only the canary has the change, and no other engine knows it."""
    lone = cluster.engine("lone")
    await lone._engine.weights.from_checkpoint(UpdateRequest(path=saved(tmp_path / "new", NEW), version="x"))
    with pytest.raises(BehindError, match="a change that the others have not"):
        await lone.join(cluster.coordinator, "lone")
