"""What becomes of the processes of a split policy when one fails, hangs, or is killed."""

import math
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shopr1_service.engine import FatalEngineError
from shopr1_service.errors import PolicyError
from shopr1_service.forward import PromptGroup
from shopr1_service.loading import load_policy
from shopr1_service.tensor_parallel import policy
from shopr1_service.tensor_parallel.policy import SplitPolicy
from shopr1_service.tensor_parallel.ranks import Ranks
from tests.service.http import WAIT_S
from tests.service.models import model_of, one_thread, policy_of, rules
from tests.service.tensor_parallel.split import (
    TOLERANCE,
    group_of,
    on_cpus,
    save,
    settings_of,
    split_policy,
    values,
)

pytestmark = on_cpus

GROUP = group_of(seed=1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SplitPolicy]:
    with split_policy(save(tmp_path_factory.mktemp("policies") / "tiny")) as policy:
        yield policy


def test_memory_that_is_short_on_one_device_is_short_on_all(
    split: SplitPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, fails = split.engine._forward, iter([True, False, False])
    batch = forward.batch

    def failing(groups: Sequence[PromptGroup]) -> list[list[Tensor]]:
        states = batch(groups)
        if next(fails):  # behind the last collective: the other device has come through
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return states

    monkeypatch.setattr(forward, "batch", failing)
    expected = values(policy_of(model_of("llama")).certainties([GROUP], rules()))
    assert values(split.certainties([GROUP], rules())) == pytest.approx(expected, rel=0, abs=TOLERANCE)
    assert split.stats.num_out_of_memory == 1
    assert next(fails, None) is None  # it was tried again in halves


def test_a_process_that_is_killed_while_this_one_waits_for_it(split: SplitPolicy) -> None:
    [worker] = split.ranks.processes
    assert split.heartbeat.age_s < WAIT_S
    worker.send_signal(signal.SIGSTOP)  # it takes no part any more, and lives
    with ThreadPoolExecutor() as pool:
        measuring = pool.submit(split.certainties, [GROUP], rules())
        worker.kill()
        with pytest.raises(FatalEngineError, match=r"process of device 1 has ended|device 0 failed"):
            measuring.result(WAIT_S)
    assert split.heartbeat.age_s == math.inf
    with pytest.raises(FatalEngineError):
        split.certainties([GROUP], rules())


def test_weights_that_cannot_be_read_end_all_processes(
    split: SplitPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split.close()  # a process has one group at a time
    started: list[Ranks] = []

    class Noted(Ranks):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            started.append(self)

    monkeypatch.setattr(policy, "Ranks", Noted)
    directory = save(tmp_path)
    (directory / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(PolicyError, match="cannot load policy"):
        load_policy(settings_of(directory))
    assert [process.poll() for process in started[0].processes] == [-signal.SIGKILL]


SPLIT = """\
import sys
from pathlib import Path
from typing import Any
from tests.service.tensor_parallel.split import split_policy

with split_policy(Path(sys.argv[1])) as policy:
    print(policy.ranks.processes[0].pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def serving(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", SPLIT, str(save(tmp_path / "tiny"))]
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield process
        process.kill()


def test_processes_end_with_the_one_that_serves(serving: "subprocess.Popen[str]") -> None:
    assert serving.stdout is not None
    fd = os.pidfd_open(int(serving.stdout.readline()))
    try:
        assert not select.select([fd], [], [], 0)[0]
        serving.kill()
        assert select.select([fd], [], [], WAIT_S)[0]
    finally:
        os.close(fd)
