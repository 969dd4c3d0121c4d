"""A server that is killed in the middle of a batch and started again: nothing is lost, nothing is wrong."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shopr1_client import AsyncClient, Client
from shopr1_client.wire import ScoreRequest, ScoreResponse
from tests.support.http import CLICK, WAIT_S, answer, group
from tests.support.models import byte_level, tiny_model

NUM_GROUPS = 100
"""More than a part has: the batch travels in several requests."""
OnProgress = Callable[[int], None]
Score = Callable[[str, ScoreRequest, OnProgress], ScoreResponse]


class Server:
    """`shopr1 serve` in a process of its own, always on the same port."""

    def __init__(self, policy: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # With the same bits in any order of arrival, equal answers mean equal numbers.
        options = ("--policy", str(policy), "--port", str(port), "--set", "deterministic=true")
        self._command = [sys.executable, "-m", "shopr1_service", "serve", "--set", "device=cpu", *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(WAIT_S)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    tiny_model().save_pretrained(directory)
    byte_level().save_pretrained(directory)
    return directory


def request() -> ScoreRequest:
    groups: list[Any] = [
        group(
            answer(rationale=f"No. {i}"),
            answer(CLICK, "The other"),
            "broken",
            truth=CLICK,
            prompt=f"page {i}",
        )
        for i in range(NUM_GROUPS)
    ]
    return ScoreRequest.model_validate({"groups": groups})


def score(url: str, batch: ScoreRequest, on_progress: OnProgress) -> ScoreResponse:
    with Client(url, max_concurrency=2) as client:
        return client.score(batch, on_progress=on_progress)


def score_async(url: str, batch: ScoreRequest, on_progress: OnProgress) -> ScoreResponse:
    return asyncio.run(AsyncClient(url, max_concurrency=2).score(batch, on_progress=on_progress))


@pytest.mark.parametrize("run", [score, score_async])
def test_a_batch_survives_the_death_of_its_server(policy: Path, run: Score) -> None:
    server = Server(policy)
    num_done: list[int] = []

    def die_once(num_rollouts: int) -> None:
        if not num_done:
            server.kill()
            server.start()
        num_done.append(num_rollouts)

    server.start()
    try:
        with Client(server.url) as client:
            client.wait_until_ready(WAIT_S)
        undisturbed = run(server.url, request(), lambda _num: None)
        # After the restart the results are lost, and the batch is computed again.
        server.kill()
        server.start()
        disturbed = run(server.url, request(), die_once)
    finally:
        server.kill()
    assert disturbed.groups == undisturbed.groups
    assert len(num_done) > 1
    assert sum(num_done) == 3 * NUM_GROUPS
    rewards = [reward.reward for score in disturbed.groups for reward in score.rewards]
    assert len(set(rewards)) > NUM_GROUPS  # each rationale has a certainty of its own
