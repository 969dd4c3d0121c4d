"""The service as a separate process, and its use of system resources."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from shopr1_client import Client
from shopr1_client.errors import NotReadyError, TransportError
from tests.support.fake_server import CENSUS
from tests.support.http import TERMINATE, WAIT_S, answer, group

FAKE = ("-m", "tests.support.fake_server")
EMBEDDED = ("-m", "shopr1_service", "serve", "--set", "device=cpu")
_ROOT = Path(__file__).parents[2]


_numbers = itertools.count()


def request(prompt: str = "page") -> dict[str, Any]:
    """A request with one rollout. Each prompt is new, because the service remembers scored ones."""
    prompt = f"{prompt} {next(_numbers)}"
    return {"groups": [group(answer(), prompt=prompt, truth=TERMINATE)]}


@dataclass(frozen=True)
class Resources:
    """Numbers of tasks, threads and open files of a process."""

    num_tasks: int
    num_threads: int
    num_files: int

    def __le__(self, other: "Resources") -> bool:
        # Pools start their threads on demand, up to a limit.
        pool = (os.cpu_count() or 1) + 4
        return (
            self.num_tasks <= other.num_tasks
            and self.num_threads <= other.num_threads + pool
            and self.num_files <= other.num_files
        )


class Process:
    """A service that is ready to score.

    Args:
        pipes: the process with its pipes, through which `fake_server` reports.
    """

    def __init__(self, port: int, pipes: "subprocess.Popen[str]") -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._pipes = pipes

    def check_reward(self) -> None:
        """Assert that a valid request gets the correct reward: 0.5 + 0.3 + 0.005 · 26."""
        answered = httpx.post(f"{self.url}/score", json=request(), timeout=WAIT_S)
        assert answered.status_code == 200, answered.text
        assert answered.json()["groups"][0]["rewards"][0]["reward"] == 0.93

    def resources(self) -> "Resources":
        """Resources that a request could leak."""
        httpx.post(f"{self.url}/score", json=request(CENSUS), timeout=WAIT_S).raise_for_status()
        proc = Path(f"/proc/{self._pipes.pid}")
        num_threads = len(list((proc / "task").iterdir()))
        return Resources(int(self._read()), num_threads, len(list((proc / "fd").iterdir())))

    def rss_bytes(self) -> int:
        """Resident memory of the process."""
        num_pages = int(Path(f"/proc/{self._pipes.pid}/statm").read_text().split()[1])
        return num_pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """CPU time of the process, of all its threads."""
        fields = Path(f"/proc/{self._pipes.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def wait_until_scoring(self) -> None:
        """Return when a request with the prompt HELD is being scored."""
        assert self._read() == "held"

    def release(self) -> None:
        """Let the held request be scored."""
        assert self._pipes.stdin is not None
        self._pipes.stdin.write("\n")
        self._pipes.stdin.flush()

    def _read(self) -> str:
        assert self._pipes.stdout is not None
        return self._pipes.stdout.readline().strip()


@contextlib.contextmanager
def process(*command: str, **environment: str) -> Iterator[Process]:
    """Run a process with these arguments to Python. It must exit with code 0."""
    yield from _process(command, None, environment)


@contextlib.contextmanager
def logging_process(log: Path, *command: str, **environment: str) -> Iterator[Process]:
    """`process` whose standard error is this file."""
    with log.open("w") as stderr:
        yield from _process(command, stderr, environment)


def _process(
    command: Sequence[str], stderr: IO[str] | None, environment: Mapping[str, str]
) -> Iterator[Process]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    pipes = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "SHOPR1_LOG_LEVEL": "error", **environment, "SHOPR1_PORT": str(port)},
    )
    with pipes:
        try:
            _wait_until_ready(pipes, f"http://127.0.0.1:{port}")
            yield Process(port, pipes)
        finally:
            pipes.terminate()
    assert pipes.returncode == 0


def _wait_until_ready(pipes: "subprocess.Popen[str]", url: str) -> None:
    with Client(url, timeout_s=WAIT_S) as client:
        while True:
            try:
                return client.wait_until_ready(1.0)
            except (TransportError, NotReadyError):
                assert pipes.poll() is None, "the service has ended"
