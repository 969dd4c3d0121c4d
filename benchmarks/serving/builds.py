"""Services of several builds on loopback ports, and their use of the machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.serving.local_server import REQUEST_TIMEOUT_S, wait_until_ready

ROOT = Path(__file__).parents[2]


def builds(before: Path | None) -> dict[str, Path]:
    """The running checkout as `now`, and another one as `before` where there is one."""
    return ({"before": before} if before else {}) | {"now": ROOT}


@dataclass(frozen=True)
class Service:
    """A service in a process of its own."""

    client: httpx.Client
    pid: int

    def cpu_s(self) -> float:
        """CPU time of the threads that its process has."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@contextlib.contextmanager
def service_of(checkout: Path, settings: Mapping[str, object]) -> Iterator[Service]:
    """The service of a checkout, ready to score. It ends with the block.

    Args:
        settings: by name, as of the environment without `SHOPR1_`.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    variables = {"port": port, "log_level": "error", "access_log": "false", **settings}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(checkout / name) for name in ("rewards", "service", "clients")),
        "OMP_NUM_THREADS": "1",
        **{f"SHOPR1_{name.upper()}": str(value) for name, value in variables.items()},
    }
    command = [sys.executable, "-m", "shopr1_service", "serve"]
    with (
        subprocess.Popen(command, env=environment, cwd=checkout) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=REQUEST_TIMEOUT_S) as client,
    ):
        try:
            wait_until_ready(client)
            yield Service(client, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
