"""A rollout log on a full disk: a small tmpfs and a service under load."""

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.http import WAIT_S, answer, group
from tests.support.process import FAKE, process

NUM_DISK_BYTES = 256 * 1024
NUM_COMPLETIONS = 16


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={NUM_DISK_BYTES}", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a disk needs root: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def send(url: str, prompt: str) -> None:
    body = {"groups": [group(*[answer()] * NUM_COMPLETIONS, prompt=prompt)]}
    answered = httpx.post(f"{url}/score", json=body, timeout=WAIT_S)
    assert answered.status_code == 200, answered.text
    assert [reward["reward"] for reward in answered.json()["groups"][0]["rewards"]] == [
        0.93
    ] * NUM_COMPLETIONS


def num_dropped(url: str) -> int:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=WAIT_S).text)
    samples = [sample for family in families for sample in family.samples]
    lost = [sample for sample in samples if sample.name == "shopr1_rollout_log_dropped_total"]
    assert all(sample.value == 0 for sample in lost if sample.labels["reason"] != "disk_full")
    return int(sum(sample.value for sample in lost))


def num_line_ends(directory: Path) -> int:
    """Line ends in all files, also while lines are written."""
    return sum(path.read_bytes().count(b"\n") for path in directory.glob("rollouts-*.jsonl"))


def num_logged(directory: Path) -> int:
    """Lines in all files. No file may end within a line."""
    content = [path.read_bytes() for path in directory.glob("rollouts-*.jsonl")]
    assert all(part.endswith(b"\n") for part in content if part)
    return sum(len([json.loads(line) for line in part.splitlines()]) for part in content)


def load(url: str, name: str, num_requests: int) -> int:
    """Send requests concurrently. Returns the number of rollouts."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: send(url, f"{name} {i}"), range(num_requests)))
    return num_requests * NUM_COMPLETIONS


def test_a_full_disk_drops_log_lines_but_no_request(disk: Path) -> None:
    directory = disk / "log"
    options = {"SHOPR1_ROLLOUT_LOG": str(directory), "SHOPR1_ROLLOUT_LOG_BYTES": "65536"}
    with process(*FAKE, **options) as service:
        num_sent = load(service.url, "filling", 64)
        while num_line_ends(directory) + num_dropped(service.url) < num_sent:
            pass
        # A line has almost 1 KiB: 256 KiB have room for 100 lines, but not for 1,024.
        num_lost = num_dropped(service.url)
        assert 100 < num_logged(directory) == num_sent - num_lost < num_sent
        # Files are deleted without a signal to the service.
        for path in directory.iterdir():
            path.unlink()
        num_sent_after = load(service.url, "after", 4)
    assert num_logged(directory) == num_sent_after
