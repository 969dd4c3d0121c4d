"""A real service with a tiny policy under a supervisor that restarts it."""

import contextlib
import functools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shopr1_client import Client
from shopr1_client.wire import GroupScore, ScoreRequest
from tests.support.http import CLICK, SEARCH, WAIT_S, answer, free_port, group
from tests.support.models import byte_level, tiny_model

ROOT = Path(__file__).parents[3]
NUM_BATCHES = 20
_SUPERVISOR = """\
[supervisord]
nodaemon = true
logfile = {directory}/supervisord.log
pidfile = {directory}/supervisord.pid

[unix_http_server]
file = {directory}/supervisor.sock

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[supervisorctl]
serverurl = unix://{directory}/supervisor.sock

[program:shopr1]
command = {command}
directory = {root}
environment = {environment}
autorestart = true
startsecs = 0
startretries = 1000
stopwaitsecs = 60
stderr_logfile = {directory}/log
"""


class Supervised:
    """The service, its supervisor and its log.

    Args:
        directory: directory of the supervisor's files.
        environment: settings, and the fault of `faulty_server`.
    """

    def __init__(self, directory: Path, *command: str, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "log"
        self._config = directory / "supervisord.conf"
        settings = {"SHOPR1_PORT": str(self.port), "SHOPR1_DEVICE": "cpu", **environment}
        self._config.write_text(
            _SUPERVISOR.format(
                directory=directory,
                root=ROOT,
                command=" ".join([sys.executable, *command]),
                environment=",".join(f'{name}="{value}"' for name, value in settings.items()),
            )
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        # As a Python module: the scripts of the virtual environment may not be on PATH.
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(self._config)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                yield
            finally:
                process.terminate()

    def ready(self, limit_s: float = WAIT_S) -> None:
        with Client(self.url, timeout_s=limit_s) as client:
            client.wait_until_ready(limit_s)

    def pid(self) -> int:
        """Process id of the service; 0 while none runs."""
        command = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(self._config), "pid", "shopr1"]
        return int(subprocess.run(command, capture_output=True, check=False, text=True).stdout or 0)

    def exits(self) -> list[str]:
        """The supervisor's log line of each exit."""
        log = self.log.parent / "supervisord.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.split("INFO ")[-1] for line in lines if "exited: shopr1" in line]


@functools.cache
def checkpoint(directory: Path) -> Path:
    """A tiny policy on disk."""
    tiny_model().save_pretrained(directory)
    byte_level().save_pretrained(directory)
    return directory


def batches() -> list[ScoreRequest]:
    """Requests of a training run: each prompt once, with correct, wrong and invalid completions."""
    return [
        ScoreRequest.model_validate({"groups": [_group(10 * i + j) for j in range(10)]})
        for i in range(NUM_BATCHES)
    ]


def _group(number: int) -> dict[str, Any]:
    completions = [
        answer(rationale=f"No. {number}"),
        answer(CLICK, f"The other {number}"),
        answer(SEARCH, "Search"),
        "broken",
    ]
    return group(*completions, truth=CLICK, prompt=f"page {number}" * (1 + number % 5))


def score_all(url: str, requests: Sequence[ScoreRequest], num_threads: int = 4) -> list[list[GroupScore]]:
    """Score all requests concurrently through the client, as trainers do."""
    with Client(url, retry_for_s=WAIT_S) as client, ThreadPoolExecutor(num_threads) as pool:
        return [answered.groups for answered in pool.map(client.score, requests)]


def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(int(WAIT_S * 20)):
        if condition():
            return
        threading.Event().wait(0.05)
    raise AssertionError(what)
