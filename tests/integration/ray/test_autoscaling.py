"""A queue that is too long for one engine: Ray starts a second one, and no request fails."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.ray.conftest import SETTINGS, client_of, replica_pids, serving
from tests.integration.ray.test_faults import until
from tests.support.http import answer, group

NUM_CLIENTS = 8

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[str]:
    """URL of an application that starts with one engine."""
    args = {"num_replicas": 1, "max_replicas": 2, "target_queued_tokens": 200, **SETTINGS}
    with serving(tmp_path, args) as url:
        yield url


def body(number: int) -> dict[str, Any]:
    return {"groups": [group(answer(), prompt=f"page {number} " * 60)]}


def test_a_long_queue_adds_an_engine(growing: str) -> None:
    is_over = threading.Event()

    def score(seed: int) -> set[int]:
        statuses, number = set(), seed
        with client_of(growing) as client:
            while not is_over.is_set():
                number += NUM_CLIENTS
                statuses.add(client.post("/score", json=body(number)).status_code)
        return statuses

    assert len(replica_pids()) == 1
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        clients = [pool.submit(score, seed) for seed in range(NUM_CLIENTS)]
        try:
            until(lambda: len(replica_pids()) == 2)
            with client_of(growing, "metrics") as client:
                until(lambda: client.get("/metrics").text.count("shopr1_policy_number{engine=") == 2)
        finally:
            is_over.set()
        assert {status for client in clients for status in client.result()} == {200}
