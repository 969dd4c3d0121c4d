"""The prefix cache by the number of prefixes: its count of memory against the process, and the time of one.

    python -m benchmarks.engine.prefix_cache [--before CHECKOUT]

Each case is measured in a process of its own. "counted" is what the cache reports, "resident" what the
process has grown by. The time is that of a new prompt in a full cache: a look-up, an insertion and an
eviction. Writes prefix_cache.csv.
"""

import argparse
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.report import Report

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NUM_ROUNDS = 5
_MODULES = {"before": "shopr1_service.prefix", "now": "shopr1_service.engine.prefix_cache"}


@dataclass(frozen=True)
class Case:
    """Equal prefixes of a policy with two key-value heads."""

    num_prefixes: int
    num_tokens: int
    num_layers: int
    head_size: int
    num_timed: int = 50

    def __str__(self) -> str:
        return f"{self.num_prefixes} of {self.num_tokens} tokens, {self.num_layers} layers"

    def chunk(self, module: ModuleType, number: int) -> Any:  # noqa: ANN401  # of either build
        ids = tuple(10_000 + number * self.num_tokens + i for i in range(self.num_tokens))
        shape = (1, 2, self.num_tokens, self.head_size)
        keys, values = (tuple(torch.ones(shape) for _ in range(self.num_layers)) for _ in range(2))
        return module.Chunk(ids, keys, values, torch.ones(1, 4 * self.head_size))


CASES = [
    *(Case(n, 32, 4, 8) for n in (1, 10, 100, 1000, 10_000)),
    *(Case(n, 2000, 24, 64, num_timed=5) for n in (1, 5, 20)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of the prefix cache.")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier build, to compare with")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of results")
    parser.add_argument("--measure", metavar="MODULE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure_all(options.measure)))
        return
    report = Report(torch.device("cpu"), "float32")
    for build, checkout in {"before": options.before, "now": ROOT}.items():
        if checkout is not None:
            _add(build, _in_process(_MODULES[build], checkout), report)
    report.write(options.output / "prefix_cache.csv")


def _add(build: str, medians: Sequence[Sequence[float]], report: Report) -> None:
    for case, (counted, resident, seconds) in zip(CASES, medians, strict=True):
        report.add(case, f"{build}: counted", counted / 2**20, "MiB")
        report.add(case, f"{build}: resident", resident / 2**20, "MiB")
        report.add(case, f"{build}: resident / counted", resident / counted, "x")
        report.add(case, f"{build}: a new prompt", seconds * 1e6, "us")


def _in_process(module: str, checkout: Path) -> Sequence[Sequence[float]]:
    """The numbers of each case, by the build in this checkout."""
    paths = [str(checkout / name) for name in ("rewards", "service", "clients")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.engine.prefix_cache", "--measure", module]
    printed = subprocess.run(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    numbers: Sequence[Sequence[float]] = json.loads(printed.stdout)
    return numbers


def _measure_all(module: str) -> Sequence[Sequence[float]]:
    """Medians of each case."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        work = [(module, case) for case in CASES for _ in range(NUM_ROUNDS)]
        rounds = pool.starmap(_measure, work, chunksize=1)
    return [
        [statistics.median(numbers) for numbers in zip(*rounds[start : start + NUM_ROUNDS], strict=True)]
        for start in range(0, len(rounds), NUM_ROUNDS)
    ]


def _measure(name: str, case: Case) -> tuple[int, int, float]:
    """Counted bytes, resident bytes, and seconds of a new prompt."""
    module = importlib.import_module(name)
    case.chunk(module, 0)  # some memory is allocated once
    cache, before_bytes = module.PrefixCache(2**60), _resident_bytes()
    for number in range(case.num_prefixes):
        cache.insert((), case.chunk(module, number))
    counted, resident = cache.stats.num_bytes, _resident_bytes() - before_bytes
    cache.max_bytes = counted
    chunks = [case.chunk(module, 20_000 + number) for number in range(case.num_timed)]
    start_s = time.process_time()
    for chunk in chunks:
        assert not cache.match(chunk.ids)
        cache.insert((), chunk)
    seconds = (time.process_time() - start_s) / len(chunks)
    assert cache.stats.num_evicted_chunks
    return counted, resident, seconds


def _resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
