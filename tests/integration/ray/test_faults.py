"""An engine and the proxy are killed under load: no request is lost, and every score is right."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from shopr1_client import Client
from shopr1_client.wire import ScoreRequest
from tests.integration.ray.conftest import (
    KEYS,
    NUM_REPLICAS,
    client_of,
    configuration,
    deploy,
    proxy_pids,
    replica_pids,
)
from tests.support.http import answer, group

NUM_REQUESTS = 48
NUM_CLIENTS = 6
NUM_BEFORE = 6
"""Number of answers before a process is killed."""
WAIT_S = 120.0

Score = Callable[[dict[str, Any]], list[float | None]]


def bodies(name: str) -> list[dict[str, Any]]:
    """Requests that all differ."""
    return [
        {"groups": [group(answer(rationale=f"Number {i}, please."), prompt=f"{name} {i} " * 60)]}
        for i in range(NUM_REQUESTS)
    ]


def expected_of(url: str, requests: Sequence[dict[str, Any]]) -> list[list[float | None]]:
    with client_of(url) as client:
        return [_rewards(client.post("/score", json=body).raise_for_status().json()) for body in requests]


def _rewards(answered: dict[str, Any]) -> list[float | None]:
    return [reward["reward"] for scored in answered["groups"] for reward in scored["rewards"]]


def scored_while(
    score: Score, requests: Sequence[dict[str, Any]], kill: Callable[[], None]
) -> list[list[float | None]]:
    """Rewards of all requests; `kill` is called when some have been answered."""
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        futures = [pool.submit(score, body) for body in requests]
        for num_done, _ in enumerate(as_completed(futures), start=1):
            if num_done == NUM_BEFORE:
                kill()
        return [future.result() for future in futures]


def until(is_true: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S * 10)):
        if is_true():
            return
        threading.Event().wait(0.1)
    raise AssertionError("the condition does not become true")


def test_no_request_is_lost_when_an_engine_dies(single: str, cluster: str) -> None:
    """The client does not retry: a lost request would fail the test."""
    requests = bodies("replica")
    expected = expected_of(single, requests)
    until(lambda: len(replica_pids()) == NUM_REPLICAS)
    victim = replica_pids()[0]
    with client_of(cluster) as client:
        scores = scored_while(
            lambda body: _rewards(client.post("/score", json=body).raise_for_status().json()),
            requests,
            lambda: os.kill(victim, signal.SIGKILL),
        )
    assert scores == expected
    until(lambda: len(replica_pids()) == NUM_REPLICAS and victim not in replica_pids())


def test_no_request_is_lost_when_the_proxy_dies(single: str, cluster: str) -> None:
    """The client library retries when a connection breaks."""
    requests = bodies("proxy")
    expected = expected_of(single, requests)
    [victim] = proxy_pids()
    with Client(cluster, api_key=KEYS["score"], timeout_s=WAIT_S) as client:
        scores = scored_while(
            lambda body: _rewards(client.score(ScoreRequest(**body)).model_dump()),
            requests,
            lambda: os.kill(victim, signal.SIGKILL),
        )
    assert scores == expected
    assert victim not in proxy_pids()


def test_no_request_is_lost_when_a_new_configuration_is_deployed(
    single: str, cluster: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """All processes are replaced, with one engine fewer; the old ones finish their requests."""
    requests, port = bodies("fewer"), int(cluster.rpartition(":")[2])
    expected = expected_of(single, requests)
    until(lambda: len(replica_pids()) == NUM_REPLICAS)
    fewer = configuration(tmp_path / "fewer.yaml", port, {"num_replicas": 1, **settings})
    with Client(cluster, api_key=KEYS["score"], timeout_s=WAIT_S) as client:
        scores = scored_while(
            lambda body: _rewards(client.score(ScoreRequest(**body)).model_dump()),
            requests,
            lambda: deploy(fewer),
        )
    assert scores == expected
    until(lambda: len(replica_pids()) == 1)
