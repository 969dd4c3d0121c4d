"""Faults of a cluster: no rollout is lost, no reward is wrong, and no operator is needed."""

import contextlib
import itertools
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from shopr1_client.wire import GroupScore, Reason, Reward, Status
from tests.integration.ops.faulty_server import FAULTS
from tests.integration.ops.supervised import Supervised, batches, checkpoint, score_all, until
from tests.support.http import WAIT_S

pytestmark = pytest.mark.timeout(900)

SERVE = ("-m", "shopr1_service", "serve")
HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
FAULTY = ("-m", "tests.integration.ops.faulty_server")
REASONS = {
    "memory": Reason.OUT_OF_MEMORY,
    "exception": Reason.ENGINE_FAILURE,
    "nan": Reason.NON_FINITE_LOGITS,
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def expected(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[GroupScore]]:
    """Responses of a service without faults."""
    service = Supervised(tmp_path_factory.mktemp("quiet"), *SERVE, **settings(policy))
    with service.running():
        service.ready()
        return score_all(service.url, batches())


def settings(policy: Path, **more: str) -> dict[str, str]:
    # Deterministic: responses are equal in any order of arrival.
    return {"SHOPR1_POLICY": str(policy), "SHOPR1_DETERMINISTIC": "true", **more}


def rewards(answers: list[list[GroupScore]]) -> list[Reward]:
    return [reward for groups in answers for group in groups for reward in group.rewards]


def num_scored(url: str) -> float:
    """Rollouts that the current process has scored; 0 if none responds."""
    try:
        text = httpx.get(f"{url}/metrics").text
    except httpx.TransportError:
        return 0.0
    rows = [row for row in text.splitlines() if row.startswith("shopr1_rollouts_total{")]
    return sum(float(row.split()[-1]) for row in rows)


# --- processes that exit -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_killed_under_load(
    policy: Path, expected: list[list[GroupScore]], tmp_path: Path, number: signal.Signals
) -> None:
    service = Supervised(tmp_path, *SERVE, **settings(policy))

    def end(times: int) -> list[int]:
        ended = []
        for _ in range(times):
            # It has answered a part of the load and is working on more.
            until(lambda: num_scored(service.url) > 0 and service.pid() > 0, "no rollout is scored")
            ended.append(service.pid())
            os.kill(ended[-1], number)
            until(lambda: service.pid() not in (0, ended[-1]), "it is not restarted")
        return ended

    with service.running(), ThreadPoolExecutor() as pool:
        service.ready()
        ending = pool.submit(end, 3)
        answers = []
        while not ending.done():
            answers.append(score_all(service.url, batches()))
        assert len(set(ending.result())) == 3
        answers.append(score_all(service.url, batches()))
        how = service.exits()
    assert all(each == expected for each in answers)
    # SIGTERM is no failure: open requests are finished.
    wanted = "exit status 0; expected" if number == signal.SIGTERM else "terminated by SIGKILL; not expected"
    assert len(how) == 3
    assert all(wanted in line for line in how), how


# --- models that fail -------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_fails_regularly(
    policy: Path, expected: list[list[GroupScore]], tmp_path: Path, fault: str
) -> None:
    switch = tmp_path / "faulty"
    switch.touch()
    service = Supervised(tmp_path, *FAULTY, **settings(policy, FAULT=fault, FAULTY_WHILE=str(switch)))
    with service.running():
        service.ready()
        during = score_all(service.url, batches())
        switch.unlink()
        after = score_all(service.url, batches())
        assert service.exits() == []  # the process survives
    pairs = list(zip(rewards(during), rewards(expected), strict=True))
    failed = [reward for reward, _ in pairs if reward.status is Status.UNSCORABLE]
    # After a lack of memory a group is computed in halves, whose sums round differently.
    assert all(
        reward.reward == pytest.approx(right.reward, abs=1e-7)
        for reward, right in pairs
        if reward.status is Status.SCORED
    )
    assert all((reward.reward, reward.reason) == (None, REASONS[fault]) for reward in failed)
    assert 0 < len(failed) < len(pairs)
    # Failures are not remembered: a new request computes them.
    assert after == expected


def test_a_device_that_hangs(policy: Path, expected: list[list[GroupScore]], tmp_path: Path) -> None:
    switch = tmp_path / "faulty"
    switch.touch()
    more = {"FAULT": "hang", "FAULTY_WHILE": str(switch), "SHOPR1_ENGINE_TIMEOUT_S": "5"}
    service = Supervised(tmp_path, *FAULTY, **settings(policy, **more))
    with service.running(), ThreadPoolExecutor() as pool:
        service.ready()
        first = service.pid()
        answers = pool.submit(score_all, service.url, batches())
        until(lambda: service.pid() not in (0, first), "it is not restarted")
        switch.unlink()
        assert answers.result() == expected
        how = service.exits()
    assert how, "it has not exited"
    assert all("exit status 1; not expected" in line for line in how), how
    assert "no heartbeat of the engine" in service.log.read_text()


# --- clients that misbehave ------------------------------------------------------------------------


def send(url: str, data: bytes, after: Callable[[socket.socket], object]) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as client:
        client.sendall(data)
        after(client)


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def drip(client: socket.socket) -> None:
    """Send single bytes until the service closes the connection."""
    client.settimeout(0.1)
    with contextlib.suppress(ConnectionError):
        while True:
            client.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                if not client.recv(65_536):
                    return


NUM_KINDS = 6


def misbehave(url: str, stop: threading.Event) -> int:
    """Run all kinds of bad clients in turn. Returns their number."""
    body = batches()[0].model_dump_json(exclude_none=True).encode()
    whole = HEAD % len(body) + body
    turns = itertools.cycle(
        [
            (whole, reset),  # while it is queued or computed
            (whole, lambda client: client.shutdown(socket.SHUT_WR)),
            (whole[: len(whole) // 2], reset),
            (whole[: len(whole) // 2], lambda client: client.shutdown(socket.SHUT_WR)),
            (HEAD[:30], drip),
            (HEAD % len(body), drip),
        ]
    )
    for count in itertools.count():
        if stop.is_set() and count >= NUM_KINDS:
            return count
        send(url, *next(turns))
    raise AssertionError


def num_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_bad_clients_do_not_affect_good_ones(
    policy: Path, expected: list[list[GroupScore]], tmp_path: Path
) -> None:
    service = Supervised(tmp_path, *SERVE, **settings(policy, SHOPR1_RECEIVE_TIMEOUT_S="1"))
    stop = threading.Event()
    with service.running(), ThreadPoolExecutor(20) as pool:
        service.ready()
        before = num_files(service.pid())
        bad = [pool.submit(misbehave, service.url, stop) for _ in range(16)]
        answers = score_all(service.url, batches())
        stop.set()
        assert all(each.result() >= NUM_KINDS for each in bad)
        assert answers == expected
        until(lambda: num_files(service.pid()) <= before, "connections are leaked")
        until(lambda: queue_tokens(service.url) == 0, "queued work is leaked")
        assert score_all(service.url, batches()) == expected
        assert service.exits() == []


def queue_tokens(url: str) -> float:
    rows = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(row.split()[-1]) for row in rows if row.startswith("shopr1_queue_tokens "))


# --- incomplete checkpoints -----------------------------------------------------------------


def test_a_checkpoint_that_is_still_being_copied(
    policy: Path, expected: list[list[GroupScore]], tmp_path: Path
) -> None:
    whole = (policy / "model.safetensors").read_bytes()
    half = checkpoint(tmp_path / "half") / "model.safetensors"
    half.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "run").mkdir()
    service = Supervised(tmp_path / "run", *SERVE, **settings(half.parent))
    with service.running(), ThreadPoolExecutor() as pool:
        answers = pool.submit(score_all, service.url, batches())
        until(lambda: len(service.exits()) >= 2, "it does not retry")
        half.write_bytes(whole)
        assert answers.result() == expected
        how = service.exits()
    assert all("exit status 1; not expected" in line for line in how), how
    assert "the policy cannot be loaded" in service.log.read_text()
