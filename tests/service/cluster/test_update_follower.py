"""Engines that start late or cannot apply a change: none of them ever scores with an old version."""

import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shopr1_client.wire_policy import UpdateRequest
from shopr1_service.cluster import engine_replica
from shopr1_service.cluster.engine_replica import EngineFailedError
from shopr1_service.cluster.messages import BehindError, Declined, Route
from shopr1_service.cluster.update_log import Change
from shopr1_service.core import Version
from shopr1_service.weights.staging import StagedWeights
from tests.support.http import WAIT_S
from tests.support.in_process_cluster import Cluster, agree, measured, running
from tests.support.models import policy_of
from tests.support.updating import PART, adapter_file, changed_model, file_of, saved, weights_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(WAIT_S)]

NEW = changed_model(1)
NEWER = changed_model(2)


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(monkeypatch, tmp_path, "a", "b") as cluster:
        yield cluster


async def test_a_late_engine_catches_up_before_it_is_ready(cluster: Cluster, tmp_path: Path) -> None:
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


async def test_an_engine_that_is_behind_declines(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.update(saved(tmp_path / "new", NEW), "x")
    late = cluster.engine("late")
    min_number = (await cluster.view()).min_number
    refused = await measured(late, Route(min_number=min_number))
    assert isinstance(refused, Declined)
    await late.join(cluster.coordinator, "late")
    assert (await agree(cluster))[1:] == ("x", 1)


@pytest.mark.parametrize("keeps_time", [False, True])
async def test_an_engine_that_finds_another_checkpoint_is_taken_out_of_service(
    cluster: Cluster, tmp_path: Path, keeps_time: bool
) -> None:
    """The canary has read the checkpoint before somebody writes to it, and perhaps sets its time back."""
    path = saved(tmp_path / "new", NEW)
    status = os.stat(f"{path}/model.safetensors")  # noqa: PTH116
    second = cluster.engines["b"]
    original = second._engine.weights._open

    def read(path: str, staged: StagedWeights) -> None:
        saved(Path(path), NEWER)
        if keeps_time:
            os.utime(f"{path}/model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
        original(path, staged)

    second._engine.weights._open = read  # type: ignore[method-assign]
    await cluster.update(path, "x")
    view = await cluster.until_ready("a")
    assert view.min_number == 1
    refused = await measured(second, Route(min_number=view.min_number))
    assert isinstance(refused, Declined)
    with pytest.raises(EngineFailedError, match="change 1 cannot be applied here: the checkpoint was writ"):
        await second.check_health()
    with pytest.raises(BehindError):  # its successor cannot apply the change, either
        await cluster.start("c")
    del cluster.engines["b"], cluster.engines["c"]
    await cluster.update(path, "y")
    await cluster.start("d")
    assert (await agree(cluster))[1:] == ("y", 2)


async def test_an_engine_that_starts_with_other_weights_scores_only_after_an_update(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory of the policy has another checkpoint by then, as `latest` does."""
    await cluster.load_adapter("lora", adapter_file(4, config=None), version="z")
    monkeypatch.setattr(engine_replica, "load_policy", lambda _settings: policy_of(changed_model(3)))
    with pytest.raises(BehindError, match="was started with other weights"):
        await cluster.start("late")
    del cluster.engines["late"]
    part = await cluster.upload(file_of(weights_of(NEWER, PART)))
    await cluster.change(Change(UpdateRequest(path="-", version="y", partial=True), part))
    with pytest.raises(BehindError, match="was started with other weights"):
        await cluster.start("late")
    del cluster.engines["late"]
    await cluster.update(saved(tmp_path / "new", NEW), "x")
    await cluster.start("late")
    assert (await agree(cluster))[1:] == ("x", 3)


async def test_an_engine_that_cannot_read_a_checkpoint_in_time_is_taken_out_of_service(
    cluster: Cluster, tmp_path: Path
) -> None:
    second, is_over = cluster.engines["b"], threading.Event()
    second._engine.weights._read_timeout_s = 0.05
    second._engine.weights._open = lambda *_: is_over.wait(WAIT_S)  # type: ignore[assignment, method-assign]
    try:
        await cluster.update(saved(tmp_path / "new", NEW), "x")
        assert (await cluster.until_ready("a")).engines == {"a": 1}
        with pytest.raises(EngineFailedError, match="have not been read within read_timeout_s"):
            await second.check_health()
    finally:
        is_over.set()


async def test_an_engine_refuses_a_version_table_that_does_not_fit_its_weights(cluster: Cluster) -> None:
    await cluster.load_adapter("lora", adapter_file(4, config=None))
    policy, before = cluster.engines["a"]._engine.policy, cluster.engines["a"]._engine.policy.versions
    other = before.with_adapter(Version("x", 9, "lora"), max_kept=2, is_default=True)
    for table in (other, before.with_base("x", 0.0)):
        with pytest.raises(ValueError, match="its versions are"):
            policy.sync_versions(table)
    assert policy.versions is before
    policy.sync_versions(before)
