"""Time of `shopr1 serve` until it is ready, with the embedded policy: first start, second start, old and new.

    python -m benchmarks.serving.start [--base CHECKOUT]

Each start is a process of its own. A first one has an empty cache directory, a second one what the first has
kept. With `--base`, starts of another checkout alternate with those of this one, with its own interpreter
(`CHECKOUT/.venv`). CPU seconds are those of the process when its policy is ready: with one thread they depend
little on other work of the machine. Runs on Linux.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import httpx
import torch

from benchmarks.report import Report
from benchmarks.serving.local_server import wait_until_ready
from shopr1_service.policy.loading import choose_dtype
from shopr1_service.settings import DType

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PACKAGES = ("rewards", "service", "clients")
STARTS = ("first", "second")
_READY = " is ready: {"
"""Part of the line that names the policy, after all steps of the start."""


@dataclass(frozen=True)
class Build:
    """A checkout and the interpreter that has its dependencies."""

    name: str
    root: Path
    python: Path


@dataclass(frozen=True)
class Cost:
    """Time of one start until it is ready."""

    cpu_s: float
    wall_s: float


def main() -> None:
    options = _options()
    builds = [Build("new", ROOT, Path(sys.executable))]
    if options.base is not None:
        builds.append(Build("old", options.base, options.base / ".venv/bin/python"))
    torch.set_num_threads(options.threads)  # the report names it
    dtype = str(choose_dtype(DType.AUTO, torch.device("cpu"))).removeprefix("torch.")
    report = Report(torch.device("cpu"), dtype)
    costs = measure(builds, options.runs, options.threads)
    _add(costs, [build.name for build in builds], report)
    report.write(options.output / "start.csv")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start of the service until it is ready.")
    parser.add_argument("--base", type=Path, metavar="CHECKOUT", help="an older checkout with its own .venv")
    parser.add_argument("--runs", type=int, default=5, help="rounds, of which the median is reported")
    parser.add_argument("--threads", type=int, default=1, help="threads of the service")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    return parser.parse_args()


def measure(builds: list[Build], num_runs: int, num_threads: int) -> Mapping[tuple[str, str], list[Cost]]:
    """Costs by build and start; builds alternate. One that keeps nothing has one kind of start."""
    costs: dict[tuple[str, str], list[Cost]] = {(b.name, start): [] for b in builds for start in STARTS}
    for _ in range(num_runs):
        caches = {build.name: tempfile.TemporaryDirectory() for build in builds}
        for start in STARTS:
            for build in builds:
                cache = Path(caches[build.name].name)
                if start == "second" and not any(cache.iterdir()):  # it keeps nothing
                    costs[build.name, start].append(costs[build.name, "first"][-1])
                    continue
                cost = start_once(build, cache, num_threads)
                print(f"{build.name}, {start} start: {cost.cpu_s:.2f} CPU s, {cost.wall_s:.2f} s", flush=True)
                costs[build.name, start].append(cost)
        for directory in caches.values():
            directory.cleanup()
    return costs


def start_once(build: Build, cache: Path, num_threads: int) -> Cost:
    """Start the service of a checkout, wait until it is ready, and end it."""
    port, start_s = _free_port(), time.perf_counter()
    with subprocess.Popen(
        [build.python, "-m", "shopr1_service", "serve", "--port", str(port)],
        cwd=build.root,
        env=_environment(build.root, cache, num_threads),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            # Its log tells: requests to it would add to its CPU time.
            log = process.stderr or ()
            assert any(_READY in line for line in log), "it has ended"
            cost = Cost(_cpu_s(process.pid), time.perf_counter() - start_s)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                wait_until_ready(client)
            return cost
        finally:
            process.terminate()


def _environment(root: Path, cache: Path, num_threads: int) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SHOPR1_")}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(str(root / package) for package in PACKAGES),
        "XDG_CACHE_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(num_threads),
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _add(costs: Mapping[tuple[str, str], list[Cost]], names: list[str], report: Report) -> None:
    for start, clock in product(STARTS, ("CPU", "wall")):
        medians = {name: _median(costs[name, start], clock) for name in names}
        for name, value in medians.items():
            report.add(f"{start} start", f"{name}, {clock}", value, "s")
        if "old" in medians:
            report.add(f"{start} start", f"old / new, {clock}", medians["old"] / medians["new"], "x")


def _median(costs: list[Cost], clock: str) -> float:
    return statistics.median(cost.cpu_s if clock == "CPU" else cost.wall_s for cost in costs)


if __name__ == "__main__":
    main()
