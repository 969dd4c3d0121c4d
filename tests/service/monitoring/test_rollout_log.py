"""What the rollout log holds, and what becomes of it when a disk is slow, full, or gone."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shopr1_rewards import load_recipe
from shopr1_service.errors import SettingsError
from shopr1_service.monitoring import rollout_log
from shopr1_service.monitoring import rotating_jsonl as jsonl_files
from shopr1_service.monitoring.rotating_jsonl import JsonlFiles
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.http import CLICK, TERMINATE, WAIT_S, answer, group, post, running, score, served

pytestmark = pytest.mark.anyio

PROMPT, RATIONALE = "a secret page", "a secret thought"


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("rollouts-*.jsonl"))


def lines(directory: Path) -> list[Any]:
    """Every line of every file; each must be whole."""
    content = [path.read_bytes() for path in files(directory)]
    assert all(part.endswith(b"\n") for part in content if part)
    return [json.loads(line) for part in content for line in part.splitlines()]


# --- what it holds ----------------------------------------------------------------------------------


async def test_a_line_for_each_rollout(tmp_path: Path) -> None:
    begin = datetime.now(UTC)
    async with running(rollout_log=tmp_path) as client:
        first = group(answer(CLICK), "{", truth=CLICK, id="g1")
        other = group(answer(CLICK), truth=json.dumps(TERMINATE))
        headers = {"X-Request-ID": "r1", "X-Run-ID": "grpo-7"}
        answered = (await post(client, {"groups": [first, other]}, **headers)).json()
    end = datetime.now(UTC)
    right, broken, wrong = lines(tmp_path)
    assert begin <= datetime.fromisoformat(right.pop("time")) <= end
    details = answered["groups"][0]["rewards"][0]["details"]
    assert right == {
        "request_id": "r1",
        "run": "grpo-7",
        "recipe": "shop_r1",
        "recipe_digest": load_recipe("shop_r1").digest,
        "policy_version": "0",
        "policy_number": 0,
        "adapter": None,
        "group": 0,
        "group_id": "g1",
        "num_rollouts": 2,
        "ground_truth": CLICK,
        "rollout": 0,
        "predicted_action": CLICK,
        # 0.5 + 0.3 + 0.2 + 1000 + 0.005 · 26
        "reward": pytest.approx(1001.13),
        "status": "scored",
        "reason": None,
        "message": None,
        "components": {
            "format": 0.5,
            "action_type": 0.3,
            "attribute": 0.2,
            "value": 1000.0,
            "self_certainty": pytest.approx(0.13),
        },
        "details": {
            key: value
            for key, value in details.items()
            if key not in ("tokens", "completion_token_ids", "predicted_action")
        },
    }
    assert (broken["group"], broken["rollout"], broken["reward"]) == (0, 1, 0)
    assert (broken["predicted_action"], broken["details"]["format_error"]) == (None, "invalid_json")
    assert (wrong["group"], wrong["rollout"], wrong["group_id"]) == (1, 0, None)
    assert (wrong["ground_truth"], wrong["predicted_action"]) == (TERMINATE, CLICK)
    assert wrong["reward"] == pytest.approx(0.63)  # 0.5 + 0.005 · 26


async def test_what_cannot_be_scored_stands_there_with_its_reason(tmp_path: Path) -> None:
    async with running(FakePolicy(max_sequence_tokens=10), rollout_log=tmp_path) as client:
        await score(client, group(answer()))
    [line] = lines(tmp_path)
    assert (line["reward"], line["status"], line["reason"]) == (None, "unscorable", "sequence_too_long")
    assert line["components"]["self_certainty"] is None


async def test_what_is_refused_is_not_logged(tmp_path: Path) -> None:
    async with running(rollout_log=tmp_path) as client:
        assert (await post(client, {"groups": [group(answer(), truth={"type": "jump"})]})).status_code == 422
    assert files(tmp_path) == []  # a service that scores nothing leaves nothing


async def test_groups_are_counted_from_request_to_request(tmp_path: Path) -> None:
    async with running(rollout_log=tmp_path) as client:
        # Ids are the clients': these two say that they are the same request.
        for prompt in ("one", "other"):
            groups = [group(answer(), prompt=prompt), group(answer(), prompt=prompt + "!")]
            await post(client, {"groups": groups}, **{"X-Request-ID": "r1"})
    assert [line["group"] for line in lines(tmp_path)] == [0, 1, 0, 1]


def asked(prompt: Any) -> dict[str, Any]:
    return group(answer(TERMINATE, RATIONALE), {"text": "{"}, {"token_ids": [123, 125]}, prompt=prompt)


async def test_no_text_unless_it_is_asked_for(tmp_path: Path) -> None:
    async with running(rollout_log=tmp_path) as client:
        await score(client, asked(PROMPT), include=["tokens", "token_ids"])
    [file] = files(tmp_path)
    assert "secret" not in file.read_text()
    # Ids are text for whoever has the tokenizer.
    assert "token_ids" not in file.read_text()
    assert len(lines(tmp_path)) == 3


@pytest.mark.parametrize(
    "prompt", [PROMPT, [{"role": "user", "content": PROMPT}], {"token_ids": list(map(ord, PROMPT))}]
)
async def test_text_where_it_is_asked_for(tmp_path: Path, prompt: Any) -> None:
    async with running(rollout_log=tmp_path, rollout_log_text=True) as client:
        await score(client, asked(prompt), include=["token_ids"])
    logged = lines(tmp_path)
    assert [line["prompt"] for line in logged] == [prompt, None, None]
    # Ids of completions are decoded: 123 and 125 are the braces.
    assert [line["completion"] for line in logged] == [answer(TERMINATE, RATIONALE), "{", "{}"]


async def test_half_surrogate_pairs_can_be_read_again(tmp_path: Path) -> None:
    async with running(rollout_log=tmp_path, rollout_log_text=True) as client:
        await score(client, group("a\ud800b", truth=CLICK, prompt=[{"role": "user", "content": "é"}]))
    [line] = lines(tmp_path)
    assert (line["completion"], line["prompt"][0]["content"]) == ("a?b", "é")


async def test_a_repeated_request_is_logged_once(tmp_path: Path) -> None:
    async with running(rollout_log=tmp_path) as client:
        for _ in range(3):
            await score(client, group(answer()))
    assert len(lines(tmp_path)) == 1


# --- files ------------------------------------------------------------------------------------------


def jsonl(directory: Path, *, max_bytes: int = 10, max_files: int = 3) -> JsonlFiles:
    return JsonlFiles(directory, max_bytes=max_bytes, max_files=max_files)


def contents(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in files(directory)]


def test_files_grow_to_their_size(tmp_path: Path) -> None:
    log = jsonl(tmp_path)
    for part in (b"1234\n", b"5678\n", b"9\n"):
        log.append(part)
    assert contents(tmp_path) == [b"1234\n5678\n", b"9\n"]


def test_what_is_larger_than_a_file_gets_one_of_its_own(tmp_path: Path) -> None:
    log = jsonl(tmp_path)
    for part in (b"1\n", b"a long line\nand another\n", b"2\n"):
        log.append(part)
    assert contents(tmp_path) == [b"1\n", b"a long line\nand another\n", b"2\n"]


def test_the_oldest_is_deleted_and_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / "rollouts-mine.jsonl").write_text("mine")
    (tmp_path / "a").write_text("other")
    log = jsonl(tmp_path, max_bytes=2)
    for number in range(1, 6):
        log.append(b"%d\n" % number)
    assert contents(tmp_path) == [b"3\n", b"4\n", b"5\n", b"mine"]
    assert (tmp_path / "a").exists()


def test_a_restart_begins_a_new_file_whose_name_comes_last(tmp_path: Path) -> None:
    (tmp_path / "rollouts-00000041-20990101T000000Z.jsonl").write_bytes(b"half a li")
    for part in (b"1\n", b"2\n"):
        log = jsonl(tmp_path)
        log.append(part)
        log.close()
    assert contents(tmp_path) == [b"half a li", b"1\n", b"2\n"]


def test_two_processes_share_a_directory(tmp_path: Path) -> None:
    one, other = jsonl(tmp_path), jsonl(tmp_path)
    for part in (b"1\n", b"2\n"):
        one.append(part)
        other.append(part)
    assert contents(tmp_path) == [b"1\n2\n", b"1\n2\n"]


def test_a_name_that_is_taken_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path).append(b"1\n")
    log = jsonl(tmp_path)
    # As if the other process had made its file just after this one looked.
    monkeypatch.setattr(log, "_known", list)
    log.append(b"2\n")
    assert contents(tmp_path) == [b"1\n", b"2\n"]


class FullDisk:
    """`os.write` on a disk that takes so many bytes and no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_free: int, code: int = errno.ENOSPC) -> None:
        self.num_free = num_free
        self._code = code
        self._write = os.write
        monkeypatch.setattr(jsonl_files, "write", self.write)

    def write(self, descriptor: int, content: memoryview) -> int:
        if self.num_free == 0:
            raise OSError(self._code, os.strerror(self._code))
        part = content[: self.num_free]
        self.num_free -= len(part)  # before the bytes can be seen: then a test may set it anew
        return self._write(descriptor, part)


def test_no_half_line_stays_in_front_of_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = jsonl(tmp_path, max_bytes=100)
    log.append(b"first\n")
    disk = FullDisk(monkeypatch, num_free=3)
    with pytest.raises(OSError, match="No space left"):
        log.append(b"lost\n")
    assert contents(tmp_path) == [b"first\n"]
    disk.num_free = 100
    log.append(b"second\n")
    assert contents(tmp_path) == [b"first\nsecond\n"]


LIMITED = """
import resource, sys
from pathlib import Path
from shopr1_service.monitoring.rotating_jsonl import JsonlFiles
log = JsonlFiles(Path(sys.argv[1]), max_bytes=100, max_files=3)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 100))
log.append(b"first\\n")
try:
    log.append(b"too long\\n")
except OSError as error:
    print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
log.append(b"second\\n")
"""


def test_the_same_where_the_system_refuses(tmp_path: Path) -> None:
    # The system takes four more bytes, and then says no: in a process of its own, as it is for all its files.
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, check=True)
    assert int(done.stdout) == errno.EFBIG
    assert contents(tmp_path) == [b"first\nsecond\n"]


def test_a_file_that_cannot_be_cut_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int, _length: int) -> None:
        raise OSError(errno.EIO, "cannot")

    log = jsonl(tmp_path, max_bytes=100)
    disk = FullDisk(monkeypatch, num_free=3)
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(OSError, match="No space left"):
        log.append(b"lost\n")
    disk.num_free = 100
    log.append(b"whole\n")
    assert contents(tmp_path) == [b"los", b"whole\n"]


def test_writing_goes_on_where_somebody_has_deleted_file_or_directory(tmp_path: Path) -> None:
    directory = tmp_path / "log"
    log = jsonl(directory, max_bytes=100)
    log.append(b"1\n")
    for path in files(directory):
        path.unlink()
    log.append(b"2\n")
    assert contents(directory) == [b"2\n"]
    for path in files(directory):
        path.unlink()
    directory.rmdir()
    log.append(b"3\n")
    assert contents(directory) == [b"3\n"]


@pytest.mark.parametrize("where", ["file/log", "/proc/log", "/proc/self"])
def test_a_directory_that_cannot_be_written_is_told_at_start(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="rollout_log: cannot write into"):
        create_app(Settings(rollout_log=tmp_path / where), LocalEngine.opener(FakePolicy))


def test_a_directory_is_made(tmp_path: Path) -> None:
    create_app(Settings(rollout_log=tmp_path / "a" / "b"), LocalEngine.opener(FakePolicy))
    assert list((tmp_path / "a" / "b").iterdir()) == []


# --- a disk that fails ------------------------------------------------------------------------------


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
def test_an_outage_costs_its_own_rollouts_only(
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


def test_a_directory_that_is_no_directory_any_more(tmp_path: Path) -> None:
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
    """`os.write` that waits until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        self._write = os.write
        monkeypatch.setattr(jsonl_files, "write", self.write)

    def write(self, descriptor: int, content: memoryview) -> int:
        self.has_begun.set()
        assert self.may_go_on.wait(WAIT_S)
        return self._write(descriptor, content)


def test_nobody_waits_for_a_slow_disk_and_what_fits_the_queue_is_kept(
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


def test_the_end_waits_for_a_disk_only_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rollout_log, "CLOSE_S", 0.1)
    disk = SlowDisk(monkeypatch)
    with served(rollout_log=tmp_path) as url:
        send(url, "is being written")
        assert disk.has_begun.wait(WAIT_S)
        send(url, "waits", num_completions=2)
    disk.may_go_on.set()
    assert told(caplog) == [("ERROR", "the rollout log is not written within 0.1 s: 2 are lost")]


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
