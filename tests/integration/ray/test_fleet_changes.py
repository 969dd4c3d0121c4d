"""What the HTTP side does with new weights and adapters; journal and engines run in the same process."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shopr1_client.errors import InvalidRequestError, InvalidWeightsError, NotFoundError, TooLargeError
from shopr1_client.wire_policy import AdapterRequest, TensorSpec, TransferRequest, UpdateRequest
from shopr1_service.cluster.messages import ClusterView
from shopr1_service.cluster.remote_updates import FleetAdapters, FleetWeights
from shopr1_service.monitoring.metrics import Metrics
from tests.support.http import WAIT_S
from tests.support.in_process_cluster import Cluster, Handle, numbers, running
from tests.support.updating import adapter_file, changed_model, file_of, saved, saved_adapter

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(WAIT_S)]

NEW = file_of(changed_model())
MAX_BYTES = 10 * len(NEW)


class Front:
    """The HTTP side, and what it has seen."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.metrics = Metrics()
        self.views: list[ClusterView] = []
        see = self.views.append
        self.weights = FleetWeights(cluster.coordinator, lambda: self.views[-1], see, self.metrics, MAX_BYTES)
        engines = Handle(cluster.engines["a"])
        self.adapters = FleetAdapters(cluster.coordinator, engines, see, MAX_BYTES)

    async def versions(self) -> set[tuple[str, int]]:
        return {(await numbers(engine))[1:] for engine in self.cluster.engines.values()}

    @property
    def num_kept(self) -> int:
        return len(self.cluster.coordinator.target._uploads)

    def updates(self, source: str, outcome: str) -> float | None:
        labels = {"source": source, "outcome": outcome}
        return self.metrics.registry.get_sample_value("shopr1_policy_updates_total", labels)


@pytest.fixture
async def front(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Front]:
    async with running(monkeypatch, tmp_path, "a", "b") as cluster:
        yield Front(cluster)


async def pieces(content: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def dying(content: bytes) -> AsyncIterator[bytes]:
    async for piece in pieces(content[: len(content) // 2]):
        yield piece
    raise ConnectionError("the sender died")


@pytest.mark.parametrize("size", [1000, 40 * 2**20])
async def test_an_upload_reaches_all_engines(front: Front, size: int) -> None:
    update = await front.weights.from_upload(pieces(NEW, size), "x", is_partial=False)
    assert await front.versions() == {("x", 1)}
    assert front.views[-1].min_number == update.current.number == 1
    assert front.updates("upload", "done") == 1
    assert front.num_kept == 1  # for engines that start late


async def test_a_checkpoint_reaches_all_engines(front: Front, tmp_path: Path) -> None:
    request = UpdateRequest(path=saved(tmp_path / "new", changed_model()), version="x")
    assert (await front.weights.from_checkpoint(request)).current.version == "x"
    assert await front.versions() == {("x", 1)}
    assert front.updates("checkpoint", "done") == 1


async def test_an_upload_whose_sender_dies_leaves_nothing(front: Front) -> None:
    with pytest.raises(ConnectionError):
        await front.weights.from_upload(dying(NEW), "x", is_partial=False)
    assert (await front.versions(), front.num_kept) == ({("0", 0)}, 0)
    assert front.updates("upload", "failed") == 1


@pytest.mark.parametrize("flaw", ["no safetensors", "cut off", "too long"])
async def test_what_is_no_file_of_weights_is_not_kept(front: Front, flaw: str) -> None:
    content = {"no safetensors": b"x" * 100, "cut off": NEW[:-1], "too long": NEW + b"x"}[flaw]
    with pytest.raises(InvalidWeightsError):
        await front.weights.from_upload(pieces(content), "x", is_partial=False)
    assert (await front.versions(), front.num_kept) == ({("0", 0)}, 0)


async def test_what_is_too_large_is_not_taken(front: Front) -> None:
    front.weights._max_bytes = front.adapters._max_bytes = 100
    with pytest.raises(InvalidWeightsError, match="100 at most"):
        await front.weights.from_upload(pieces(NEW), "x", is_partial=False)
    with pytest.raises(TooLargeError, match="100 at most"):
        await front.adapters.from_upload(pieces(adapter_file()), AdapterRequest(name="a", path="-"))
    assert front.num_kept == 0


async def test_a_directory_may_have_another_adapter_later(front: Front, tmp_path: Path) -> None:
    path = saved_adapter(tmp_path / "lora")
    loaded = await front.adapters.from_directory(AdapterRequest(name="lora", path=path, default=True))
    assert (loaded.current.version, loaded.current.number) == ("1", 1)
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    await front.cluster.start("late")
    assert await front.versions() == {("1", 1)}
    await front.adapters.unload("lora")
    assert await front.versions() == {("0", 0)}
    assert front.num_kept == 0
    with pytest.raises(NotFoundError):
        await front.adapters.unload("lora")
    with pytest.raises(InvalidWeightsError, match="no directory of this name"):
        await front.adapters.from_directory(AdapterRequest(name="lora", path="nowhere"))


async def test_an_uploaded_adapter_has_its_config_with_it(front: Front) -> None:
    request = AdapterRequest(name="lora", path="-", version="7", default=True)
    await front.adapters.from_upload(pieces(adapter_file()), request)
    assert await front.versions() == {("7", 1)}


async def test_a_broadcast_is_refused(front: Front) -> None:
    tensors = [TensorSpec(name="x", dtype="F32", shape=[1])]
    request = TransferRequest(version="x", host="localhost", port=1, tensors=tensors)
    with pytest.raises(InvalidRequestError, match="send the weights, or name a checkpoint"):
        await front.weights.from_trainer(request)
