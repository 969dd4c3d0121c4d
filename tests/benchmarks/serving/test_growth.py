"""Each thing that grows is measured by requests that the service answers."""

import os
from collections.abc import Iterator

import pytest

from benchmarks.serving.builds import Service
from benchmarks.serving.growth import ALL, Growing, PromptTokens
from benchmarks.serving.local_server import served
from shopr1_service.settings import Settings
from tests.support.models import policy_of, tiny_model


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    policy = policy_of(tiny_model(max_position_embeddings=4096), max_sequence_tokens=4096)
    with served(Settings(adapter_versions=1), policy) as client:
        yield Service(client, os.getpid())


@pytest.mark.parametrize("kind", ALL)
def test_a_level_is_reached_and_worked_at(service: Service, kind: type[Growing]) -> None:
    growing, before_s = kind(), service.cpu_s()
    n = 600 if kind is PromptTokens else 3
    growing.grow(service, 0, n)
    assert growing.work(service, n) > 0
    assert service.cpu_s() > before_s
