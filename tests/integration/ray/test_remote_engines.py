"""The HTTP side's client of the engines, without Ray's processes: handles are fakes, errors are Ray's."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError

from shopr1_client.errors import (
    InvalidRequestError,
    InvalidWeightsError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    TooLargeError,
)
from shopr1_client.wire_policy import (
    AdapterRequest,
    TensorSpec,
    TransferRequest,
    UpdateRequest,
    VersionDemand,
)
from shopr1_rewards import load_recipe
from shopr1_service.cluster.engine_replica import Description
from shopr1_service.cluster.messages import ClusterView, Declined, Route
from shopr1_service.cluster.remote_engines import RemoteEngines
from shopr1_service.core import (
    BatchKey,
    Certainty,
    CompletionTokens,
    GroupCertainties,
    PromptKey,
    Target,
    TokenGroup,
    Version,
)
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.fake import FakePolicy
from tests.support.http import WAIT_S
from tests.support.in_process_cluster import Cluster, Handle, numbers, running
from tests.support.updating import adapter_file, changed_model, file_of, saved, saved_adapter

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(WAIT_S)]

BATCH_KEY = BatchKey(load_recipe("shop_r1").self_certainty)
GROUP = TokenGroup(PromptKey((1, 2, 3)), [CompletionTokens((4, 5), (0, 1))])
MEASURED = GroupCertainties([Certainty((26.0, 26.0))], Version("0"))
DIED = ActorDiedError()
NEW = file_of(changed_model())


class Response:
    """Ray's future of a known outcome; None: it is never done."""

    def __init__(self, outcome: Any) -> None:
        self.is_cancelled = False
        self._outcome = outcome

    def __await__(self) -> Any:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        if self._outcome is None:
            await asyncio.Event().wait()
        if isinstance(self._outcome, Exception) and not isinstance(self._outcome, OverloadedError):
            raise self._outcome
        return self._outcome

    def cancel(self) -> None:
        self.is_cancelled = True


class Engines:
    """Ray's handle of engines that return one outcome after the other."""

    def __init__(self, *outcomes: Any) -> None:
        self.compute_certainties = self
        self.responses: list[Response] = []
        self.routes: list[Route] = []
        self._outcomes: Iterator[Any] = iter(outcomes)

    def remote(self, _group: TokenGroup, _key: BatchKey, route: Route) -> Response:
        self.routes.append(route)
        self.responses.append(Response(next(self._outcomes)))
        return self.responses[-1]


def client_of(engines: Engines) -> RemoteEngines:
    policy = FakePolicy()
    view = ClusterView(0, policy.versions)
    return RemoteEngines(engines, None, Description(policy.info, policy.codec, 1, 1), view, Metrics())


# --- scoring ----------------------------------------------------------------------------------------


async def test_a_group_goes_to_another_engine_when_one_dies() -> None:
    engines = Engines(DIED, ActorUnavailableError("x", b"0" * 16), MEASURED)
    assert await client_of(engines).compute_certainties([GROUP], BATCH_KEY) == [MEASURED]
    assert len(engines.responses) == 3


async def test_a_group_that_kills_engines_is_refused() -> None:
    engines = Engines(*[DIED] * 9)
    with pytest.raises(NotReadyError, match="5 engines died"):
        await client_of(engines).compute_certainties([GROUP], BATCH_KEY)
    assert len(engines.responses) == 5


@pytest.mark.parametrize("refusal", [OverloadedError("full", retry_after_s=3.0), BackPressureError(9, 9)])
async def test_if_one_group_is_refused_the_others_are_cancelled(refusal: Exception) -> None:
    engines = Engines(None, refusal, None)
    with pytest.raises(OverloadedError) as caught:
        await client_of(engines).compute_certainties([GROUP] * 3, BATCH_KEY)
    assert caught.value.retry_after_s
    await asyncio.sleep(0)
    assert [response.is_cancelled for response in engines.responses] == [True, False, True]


async def test_an_engine_that_declines_is_not_asked_again() -> None:
    engines = Engines(Declined("a", NotReadyError("behind", retry_after_s=1.0)), MEASURED)
    client = client_of(engines)
    client.view = ClusterView(1, client.versions, 0, {0: client.versions}, {"a": 0, "b": 0})
    assert await client.compute_certainties([GROUP], BATCH_KEY) == [MEASURED]
    assert [route.among for route in engines.routes] == [frozenset("ab"), frozenset("b")]


async def test_if_all_engines_decline_the_reason_of_the_last_one_is_raised() -> None:
    engines = Engines(*(Declined(name, NotReadyError(f"{name} is behind")) for name in "ab"))
    client = client_of(engines)
    client.view = ClusterView(1, client.versions, 0, {0: client.versions}, {"a": 0, "b": 0})
    with pytest.raises(NotReadyError, match="b is behind"):
        await client.compute_certainties([GROUP], BATCH_KEY)


async def test_a_demanded_version_is_computed_by_engines_that_have_it() -> None:
    engines = Engines(MEASURED)
    client = client_of(engines)
    old = client.versions
    new = old.with_base("x", 0.0)
    client.view = ClusterView(1, new, 0, {0: old, 1: new}, {"a": 0, "b": 1})
    await client.compute_certainties(
        [GROUP], BatchKey(BATCH_KEY.rules, Target(demand=VersionDemand(exact="x")))
    )
    assert engines.routes == [Route(frozenset("b"), 0)]


def test_the_settled_number_is_the_former_one_while_engines_differ() -> None:
    """An answer during an update is stored under the former version, whichever has computed it."""
    client = client_of(Engines())
    old = client.versions
    new = old.with_base("x", 0.0)
    client.view = ClusterView(1, new, 0, {0: old, 1: new}, {"a": 0, "b": 1})
    assert (client.settled_number, client.info.version) == (0, "x")
    client.view = ClusterView(2, new, 1, {1: new}, {"a": 1, "b": 1})
    assert client.settled_number == 1


async def test_a_group_without_completions_is_not_sent() -> None:
    [measured] = await client_of(Engines()).compute_certainties([TokenGroup(PromptKey(()), [])], BATCH_KEY)
    assert measured.values == []
    assert measured.version.name == "0"


# --- changes ----------------------------------------------------------------------------------------


class Front:
    """The HTTP side of engines in this process."""

    def __init__(self, cluster: Cluster, description: Description, view: ClusterView) -> None:
        self.cluster = cluster
        self.metrics = Metrics()
        engines = Handle(cluster.engines["a"])
        self.client = RemoteEngines(engines, cluster.coordinator, description, view, self.metrics)

    async def versions(self) -> set[tuple[str, int]]:
        return {(await numbers(engine))[1:] for engine in self.cluster.engines.values()}

    @property
    def num_uploads(self) -> int:
        return len(self.cluster.coordinator.target._uploads)

    def updates(self, source: str, outcome: str) -> float | None:
        labels = {"source": source, "outcome": outcome}
        return self.metrics.registry.get_sample_value("shopr1_policy_updates_total", labels)


@pytest.fixture
async def front(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Front]:
    async with running(monkeypatch, tmp_path, "a", "b") as cluster:
        yield Front(cluster, await cluster.engines["a"].describe(), await cluster.view())


async def blocks(content: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def broken_off(content: bytes) -> AsyncIterator[bytes]:
    async for block in blocks(content[: len(content) // 2]):
        yield block
    raise ConnectionError("the sender died")


@pytest.mark.parametrize("size", [1000, 40 * 2**20])
async def test_an_upload_reaches_all_engines(front: Front, size: int) -> None:
    update = await front.client.load_upload(blocks(NEW, size), "x", is_partial=False)
    assert await front.versions() == {("x", 1)}
    assert front.client.settled_number == update.current.number == 1
    assert front.updates("upload", "done") == 1
    assert front.num_uploads == 1  # for engines that start late


async def test_a_large_upload_is_sent_in_chunks(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shopr1_service.cluster.remote_engines._CHUNK_BYTES", 10_000)
    coordinator, append, sizes = front.cluster.coordinator.target, front.cluster.coordinator.target.append, []

    async def append_and_record(upload: str, chunk: bytes) -> Any:
        sizes.append(len(chunk))
        return await append(upload, chunk)

    coordinator.append = append_and_record
    await front.client.load_upload(blocks(NEW, 25_001), "x", is_partial=False)
    assert await front.versions() == {("x", 1)}
    assert (set(sizes[:-1]), sum(sizes)) == ({10_000}, len(NEW))


async def test_a_checkpoint_reaches_all_engines(front: Front, tmp_path: Path) -> None:
    request = UpdateRequest(path=saved(tmp_path / "new", changed_model()), version="x")
    assert (await front.client.load_checkpoint(request)).current.version == "x"
    assert await front.versions() == {("x", 1)}
    assert front.updates("checkpoint", "done") == 1


async def test_an_upload_whose_sender_dies_leaves_nothing(front: Front) -> None:
    with pytest.raises(ConnectionError):
        await front.client.load_upload(broken_off(NEW), "x", is_partial=False)
    assert (await front.versions(), front.num_uploads) == ({("0", 0)}, 0)
    assert front.updates("upload", "failed") == 1


@pytest.mark.parametrize("flaw", ["no safetensors", "cut off", "too long"])
async def test_an_upload_that_is_no_safetensors_file_is_not_stored(front: Front, flaw: str) -> None:
    content = {"no safetensors": b"x" * 100, "cut off": NEW[:-1], "too long": NEW + b"x"}[flaw]
    with pytest.raises(InvalidWeightsError):
        await front.client.load_upload(blocks(content), "x", is_partial=False)
    assert (await front.versions(), front.num_uploads) == ({("0", 0)}, 0)


async def test_an_upload_that_is_too_large_is_not_stored(front: Front) -> None:
    info, codec = front.client.info, front.client.codec
    front.client._description = Description(info, codec, max_weight_bytes=100, max_adapter_bytes=100)
    with pytest.raises(InvalidWeightsError, match="100 at most"):
        await front.client.load_upload(blocks(NEW), "x", is_partial=False)
    request = AdapterRequest(name="a", path="-")
    with pytest.raises(TooLargeError, match="100 at most"):
        await front.client.load_uploaded_adapter(blocks(adapter_file()), request)
    assert front.num_uploads == 0


async def test_an_adapter_stays_the_same_when_its_directory_changes(front: Front, tmp_path: Path) -> None:
    path = saved_adapter(tmp_path / "lora")
    loaded = await front.client.load_adapter(AdapterRequest(name="lora", path=path, default=True))
    assert (loaded.current.version, loaded.current.number) == ("1", 1)
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    await front.cluster.start("late")
    assert await front.versions() == {("1", 1)}
    await front.client.unload_adapter("lora")
    assert await front.versions() == {("0", 0)}
    assert front.num_uploads == 0
    with pytest.raises(NotFoundError):
        await front.client.unload_adapter("lora")
    with pytest.raises(InvalidWeightsError, match="no directory of this name"):
        await front.client.load_adapter(AdapterRequest(name="lora", path="nowhere"))


async def test_an_uploaded_adapter_contains_its_config(front: Front) -> None:
    request = AdapterRequest(name="lora", path="-", version="7", default=True)
    await front.client.load_uploaded_adapter(blocks(adapter_file()), request)
    assert await front.versions() == {("7", 1)}


async def test_a_broadcast_is_refused(front: Front) -> None:
    tensors = [TensorSpec(name="x", dtype="F32", shape=[1])]
    request = TransferRequest(version="x", host="localhost", port=1, tensors=tensors)
    with pytest.raises(InvalidRequestError, match="send the weights, or name a checkpoint"):
        await front.client.receive_broadcast(request)
