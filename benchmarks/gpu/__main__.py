"""Correctness and speed on a CUDA device: `python -m benchmarks.gpu`. README.md explains the rows."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.correctness import check_numbers
from benchmarks.gpu.models import random_policy, speed_model
from benchmarks.gpu.parts import measure_parts
from benchmarks.gpu.results import Budget, Results
from benchmarks.gpu.speed import SHAPES, TINY_SHAPES, measure_speed
from benchmarks.gpu.update import measure_update

OUTPUT = Path(__file__).with_name("results.csv")
BUDGET_S = 450.0
UPDATE_S = 100.0
"""Reserved for the weight update, which comes last."""
NO_DEVICE = "no CUDA device: run on a machine that has one, or pass --tiny for a smoke run on the CPU"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything that fits into the budget. Returns 0, 1 if a row failed, 2 without a device."""
    options = _options(arguments)
    if not (torch.cuda.is_available() or options.tiny):
        print(NO_DEVICE, file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget, results = Budget(options.budget_s), Results(device)
    try:
        check_numbers(device, budget, results)
        _measure(device, budget, results, is_tiny=options.tiny)
    finally:
        results.write(options.output)
    print(f"{len(results.rows)} rows, {len(results.failures)} failed")
    return 1 if results.failures else 0


def _measure(device: torch.device, budget: Budget, results: Results, *, is_tiny: bool) -> None:
    """Parts, speed and weight updates of one model: Qwen2.5-3B's shape in bf16, or a tiny one in fp32."""
    dtype = torch.float32 if is_tiny else torch.bfloat16
    shapes, update_s = (TINY_SHAPES, 0.0) if is_tiny else (SHAPES, UPDATE_S)
    with tempfile.TemporaryDirectory() as directory:
        policy = random_policy(speed_model(device, dtype, is_tiny=is_tiny), Path(directory))
        measure_parts(policy, budget, results, is_tiny=is_tiny)
        measure_speed(policy, shapes, budget, update_s, results)
        measure_update(policy, Path(directory), budget, update_s, results)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Correctness and speed on a CUDA device.")
    parser.add_argument("--tiny", action="store_true", help="a smoke run with a tiny model, also on a CPU")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="steps that take longer are skipped")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the CSV file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
