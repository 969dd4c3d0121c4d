"""Defaults of an engine client: it refuses updates."""

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from shopr1_client.errors import InvalidRequestError
from shopr1_client.wire_policy import AdapterRequest, TransferRequest, UpdateRequest
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.engine_client import EngineClient
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.settings import Settings

pytestmark = pytest.mark.anyio


UPDATE = UpdateRequest(path="new", version="1")


ADAPTER = AdapterRequest(name="a", path="new")


TRANSFER = TransferRequest.model_construct(version="1")


@pytest.fixture
def engine() -> Iterator[LocalEngine[FakePolicy]]:
    engine = LocalEngine(FakePolicy(10.0, 0.5), Settings(), Metrics())
    yield engine
    engine.close()


async def _stream() -> AsyncIterator[bytes]:
    yield b""


CHANGES: list[Callable[[EngineClient], Any]] = [
    lambda engine: engine.load_checkpoint(UPDATE),
    lambda engine: engine.load_upload(_stream(), "1", is_partial=False),
    lambda engine: engine.receive_broadcast(TRANSFER),
    lambda engine: engine.load_adapter(ADAPTER),
    lambda engine: engine.load_uploaded_adapter(_stream(), ADAPTER),
    lambda engine: engine.unload_adapter("a"),
]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
async def test_a_policy_without_weights_refuses_updates(
    engine: LocalEngine[FakePolicy], change: Callable[[EngineClient], Any]
) -> None:
    with pytest.raises(InvalidRequestError, match="does not change"):
        await change(engine)
    assert engine.update_progress is None
