"""A session with and without the prefix cache: `python -m benchmarks.engine.session [--before CHECKOUT]`.

Each step's prompt extends the one before it. A number is CPU time on one thread, for all steps, hidden states
and head. The policy has one random layer of the shape of SmolLM2-135M's 30, and a vocabulary in proportion.
Each build has a process, which runs sessions by turns with the other. Writes session.csv.
"""

import argparse
import importlib
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import Report
from shopr1_rewards.recipe import Divergence
from shopr1_rewards.self_certainty import divergences


class Shape(NamedTuple):
    """As `benchmarks.workloads.Shape`, which an older build cannot import."""

    P: int
    G: int
    R: int

    def __str__(self) -> str:
        return f"P{self.P} G{self.G} R{self.R}"


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NUM_STEPS, NUM_LEAD_TOKENS, NUM_ROUNDS = 8, 3, 5
SHAPES = (Shape(6000, 8, 64), Shape(6000, 1, 64))
CACHES = {"with": 2**31, "without": 0}
"""Bytes of the prefix cache."""
SIZES = {
    "vocab_size": 49_152 // 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
_MODULES = {
    "before": ("shared_forward", "forward", "prefix", "head"),
    "now": ("engine.forward.shared_prefix", "engine.forward.base", "engine.prefix_cache", "engine.lm_head"),
}
"""Modules of the forward, of its groups, of the cache and of the head, by build."""


def main() -> None:
    parser = argparse.ArgumentParser(description="A session with and without the prefix cache.")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier build, to compare with")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of results")
    parser.add_argument("--serve", choices=_MODULES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    report = Report(torch.device("cpu"), "float32")
    checkouts = {"before": options.before, "now": ROOT} if options.before else {"now": ROOT}
    processes = {build: _process(build, checkout) for build, checkout in checkouts.items()}
    for number, shape in enumerate(SHAPES):
        rounds = [[_ask(each, number) for each in processes.values()] for _ in range(NUM_ROUNDS)]
        for build, times_s in zip(processes, zip(*rounds, strict=True), strict=True):
            _add(build, shape, times_s, report)
    for process in processes.values():
        process.communicate()
    report.write(options.output / "session.csv")


def _add(build: str, shape: Shape, rounds: Sequence[Sequence[float]], report: Report) -> None:
    workload = f"{NUM_STEPS} steps to {shape}"
    for name, times_s in zip(CACHES, zip(*rounds, strict=True), strict=True):
        report.add(workload, f"{build}: {name} cache", statistics.median(times_s), "s")
    ratio = statistics.median(without_s / with_s for with_s, without_s in rounds)
    report.add(workload, f"{build}: without / with cache", ratio, "x")


def _process(build: str, checkout: Path) -> "subprocess.Popen[str]":
    paths = [str(checkout / name) for name in ("rewards", "service", "clients")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.engine.session", "--serve", build]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def _ask(process: "subprocess.Popen[str]", number: int) -> Sequence[float]:
    """Times of a session of this shape, for each cache."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(number, file=process.stdin, flush=True)
    return [float(word) for word in process.stdout.readline().split()]


def serve(build: str) -> None:
    """Run a session for each line of the standard input, the number of a shape; print its times."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))  # type: ignore[arg-type]
    forward, base, cache, head = (
        importlib.import_module(f"shopr1_service.{name}") for name in _MODULES[build]
    )
    linear = head.LinearHead(model.lm_head.weight.detach())

    def step(strategy: Any, prompt_ids: Sequence[int], shape: Shape) -> None:  # noqa: ANN401  # of either build
        positions = range(NUM_LEAD_TOKENS - 1, NUM_LEAD_TOKENS - 1 + shape.R)
        suffixes = [
            base.Suffix((*range(NUM_LEAD_TOKENS), *_ids(shape.R - 1)), tuple(positions))
            for _ in range(shape.G)
        ]
        [states] = strategy.batch([base.PromptGroup(prompt_ids, suffixes)])
        divergences(torch.cat(states), linear, Divergence.KL_U_P)

    def session_s(num_bytes: int, shape: Shape) -> float:
        strategy, ids = forward.SharedPrefixForward(model, cache.PrefixCache(num_bytes)), _ids(shape.P)
        ends = [shape.P * number // NUM_STEPS for number in range(1, NUM_STEPS + 1)]
        start_s = time.process_time()
        with torch.inference_mode():
            for end in ends:
                step(strategy, ids[:end], shape)
        return time.process_time() - start_s

    session_s(2**31, Shape(80, 2, 8))
    for line in sys.stdin:
        print(*(session_s(num_bytes, SHAPES[int(line)]) for num_bytes in CACHES.values()), flush=True)


def _ids(num_tokens: int) -> tuple[int, ...]:
    return tuple(random.choices(range(10, SIZES["vocab_size"]), k=num_tokens))


if __name__ == "__main__":
    main()
