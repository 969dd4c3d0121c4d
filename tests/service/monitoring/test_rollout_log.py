"""The rollout log on a disk that is slow, full or unavailable."""

import errno
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shopr1_service.monitoring import rollout_log, rotating_jsonl
from tests.support.http import WAIT_S, answer, group, served
from tests.support.rollout_files import FullDisk, contents, files, lines


def dropped(url: str) -> dict[str, float]:
    """Rollouts that are missing in the log, by reason, of those that are any."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=WAIT_S).text)
    samples = [s for family in families for s in family.samples]
    lost = {s.labels["reason"]: s.value for s in samples if s.name == "shopr1_rollout_log_dropped_total"}
    assert lost.keys() == {"queue_full", "disk_full", "error", "shutdown"}
    return {reason: value for reason, value in lost.items() if value}


def send(url: str, prompt: str, num_completions: int = 1) -> None:
    body = {"groups": [group(*[answer()] * num_completions, prompt=prompt)]}
    assert httpx.post(f"{url}/score", json=body, timeout=WAIT_S).status_code == 200


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        pass


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(r.levelname, r.getMessage()) for r in caplog.records if r.name == rollout_log.__name__]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "disk_full"),
        (errno.EFBIG, "disk_full"),
        (errno.EIO, "error"),
    ],
)
def test_an_outage_drops_only_its_own_rollouts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    reason: str,
) -> None:
    caplog.set_level(logging.INFO)
    disk = FullDisk(monkeypatch, num_free=10**9, code=code)
    with served(rollout_log=tmp_path) as url:
        send(url, "before")
        until(lambda: b"\n" in b"".join(contents(tmp_path)))
        disk.num_free = 20
        for prompt in ("during", "still"):
            send(url, prompt, num_completions=2)
        until(lambda: dropped(url) == {reason: 4})
        disk.num_free = 10**9
        send(url, "after")
    assert [line["num_rollouts"] for line in lines(tmp_path)] == [1, 1]
    [begin, end] = told(caplog)
    assert begin == (
        "ERROR",
        f"the rollout log cannot be written, rollouts are dropped: [Errno {code}] {os.strerror(code)}",
    )
    assert end == ("WARNING", "the rollout log is written again; 4 rollouts were dropped")


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    directory = tmp_path / "log"
    with served(rollout_log=directory) as url:
        directory.rmdir()
        directory.touch()
        send(url, "during")
        until(lambda: dropped(url) == {"error": 1})
        directory.unlink()
        send(url, "after")
    assert len(lines(directory)) == 1


class SlowDisk:
    """`os.write` that waits until it may continue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        self._write = os.write
        monkeypatch.setattr(rotating_jsonl, "write", self.write)

    def write(self, descriptor: int, content: memoryview) -> int:
        self.has_begun.set()
        assert self.may_go_on.wait(WAIT_S)
        return self._write(descriptor, content)


def test_requests_do_not_wait_for_a_slow_disk_and_the_queue_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Room for two groups of three.
    monkeypatch.setattr(rollout_log, "MAX_QUEUED_BYTES", 6 * 1500)
    disk = SlowDisk(monkeypatch)
    with served(rollout_log=tmp_path) as url:
        send(url, "is being written", num_completions=1)
        assert disk.has_begun.wait(WAIT_S)
        # The disk does not move before all of them are answered.
        for prompt in ("first", "second", "third", "fourth"):
            send(url, prompt, num_completions=3)
        assert dropped(url) == {"queue_full": 6}
        disk.may_go_on.set()
    # Ending, the service writes what is queued.
    assert [line["num_rollouts"] for line in lines(tmp_path)] == [1] + [3] * 6


def test_shutdown_waits_for_the_disk_only_close_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rollout_log, "CLOSE_S", 0.1)
    disk = SlowDisk(monkeypatch)
    with served(rollout_log=tmp_path) as url:
        send(url, "is being written")
        assert disk.has_begun.wait(WAIT_S)
        send(url, "waits", num_completions=2)
    disk.may_go_on.set()
    assert told(caplog) == [("ERROR", "the rollout log was not written within 0.1 s: 2 rollouts dropped")]


def test_all_of_a_burst_is_written(tmp_path: Path) -> None:
    with served(rollout_log=tmp_path, rollout_log_bytes=20_000) as url, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: send(url, f"page {i}", num_completions=2), range(64)))
        assert dropped(url) == {}
    logged = lines(tmp_path)
    assert len(logged) == 128
    assert all(
        one["request_id"] == other["request_id"] for one, other in zip(logged[::2], logged[1::2], strict=True)
    )
    assert 2 < len(files(tmp_path)) <= 16
    assert all(path.stat().st_size <= 20_000 for path in files(tmp_path))
