"""Costs of one engine for the simulation: measured, fitted, written to costs.csv, and read from there.

One thread, as an engine on a core of its own has, and CPU time, which other processes disturb little. The
costs are a least-squares fit of relative errors over passes of different shapes. Run by
`make bench-simulation`.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.capacity.engine import Costs
from benchmarks.report import Report
from benchmarks.subject import RECIPE, embedded_policy
from benchmarks.workloads import Shape, Workloads
from shopr1_service.cluster.prefix_affinity import Affinity, Work
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.policy.loading import choose_device
from shopr1_service.settings import load_settings

FOLDER = Path(__file__).parent
COSTS = FOLDER / "costs.csv"
INGRESS_COST = FOLDER.parent / "serving" / "ingress_cost.csv"
NUM_RUNS = 2
NAMES = ("fixed", "prompt token", "completion token", "pair of tokens")
UNITS = ("ms", "ms", "ms", "ns")
PER_S = {"ms": 1e3, "us": 1e6, "ns": 1e9}
CACHE_SIZE, CACHE_BYTES, CACHED_TOKENS = "prefix cache of 2 GiB", 2**31, 64
NUM_ENGINES, NUM_DECISIONS = 256, 2000
PROMPT_BLOCKS, STEPS = 16, 8


@dataclass(frozen=True)
class Pass:
    """A pass of the engine: `num_cached` prompt tokens are in the prefix cache, P of the shape are not."""

    num_cached: int
    shape: Shape

    def __str__(self) -> str:
        return f"{self.num_cached} cached, {self.shape}"


PASSES = (
    Pass(0, Shape(16, 1, 4)),
    Pass(0, Shape(128, 1, 16)),
    Pass(0, Shape(128, 8, 32)),
    Pass(0, Shape(512, 1, 16)),
    Pass(0, Shape(512, 4, 64)),
    Pass(0, Shape(1500, 1, 16)),
    Pass(1500, Shape(128, 1, 16)),
    Pass(1500, Shape(256, 4, 64)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Costs of one engine.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(choose_device("cpu"), "float32")
    engine_costs(report)
    routing_cost(report)
    report.write(options.output / COSTS.name)


# --- the engine -------------------------------------------------------------------------------------


def engine_costs(report: Report) -> None:
    """Time passes of all shapes and fit the costs to them."""
    policy = embedded_policy(load_settings({"dtype": "float32"}))
    torch.set_num_threads(1)
    workloads = Workloads(policy.codec)
    sizes, times_s = list[tuple[int, int, int]](), list[float]()
    for each in PASSES:
        num_completion_tokens = sum(map(len, workloads.completions(each.shape)))
        sizes.append((each.num_cached, each.shape.P, num_completion_tokens))
        times_s.append(min(_pass_s(policy, workloads, each) for _ in range(NUM_RUNS)))
        report.add(each, "engine", times_s[-1], "s")
    report.add("one engine", CACHE_SIZE, CACHE_BYTES / _bytes_per_token(policy, workloads), "tokens")
    _add_fit(np.array([features(*size) for size in sizes]), np.array(times_s), report)


def features(num_cached: int, num_uncached: int, num_completion_tokens: int) -> tuple[float, ...]:
    """Quantities in which the cost of a pass is linear.

    Pairs are token pairs of attention. Completions attend to the prompt, and hardly to each other.
    """
    pairs = num_uncached * (num_cached + num_uncached / 2)
    pairs += num_completion_tokens * (num_cached + num_uncached)
    return 1.0, num_uncached, num_completion_tokens, pairs


def _pass_s(policy: LoadedPolicy, workloads: Workloads, each: Pass) -> float:
    prompt_ids = workloads.prompt_ids(each.num_cached + each.shape.P)
    if each.num_cached:
        cached = workloads.group(Shape(each.num_cached, 1, 4), prompt_ids[: each.num_cached])
        policy.certainties([cached], RECIPE.self_certainty)
    group = workloads.group(each.shape, prompt_ids)
    start_s = time.thread_time()
    policy.certainties([group], RECIPE.self_certainty)
    return time.thread_time() - start_s


def _bytes_per_token(policy: LoadedPolicy, workloads: Workloads) -> float:
    before = policy.stats.cache.num_bytes
    policy.certainties([workloads.group(Shape(CACHED_TOKENS, 1, 4))], RECIPE.self_certainty)
    return (policy.stats.cache.num_bytes - before) / CACHED_TOKENS


def _add_fit(rows: np.ndarray, times_s: np.ndarray, report: Report) -> None:
    costs_s = nonnegative_fit(rows / times_s[:, None])
    for name, unit, cost_s in zip(NAMES, UNITS, costs_s, strict=True):
        report.add("one engine", name, cost_s * PER_S[unit], unit)
    errors = np.abs(rows @ costs_s / times_s - 1)
    report.add("one engine", "largest error of the fit", float(errors.max()), "")


def nonnegative_fit(rows: np.ndarray) -> np.ndarray:
    """Numbers x ≥ 0 that bring rows · x closest to 1. Negative ones are set to 0, the worst first."""
    used = list(range(rows.shape[1]))
    while True:
        x = np.zeros(rows.shape[1])
        # Columns are scaled first: there are a million times as many pairs as passes.
        scales = np.abs(rows[:, used]).max(axis=0)
        x[used] = np.linalg.lstsq(rows[:, used] / scales, np.ones(len(rows)), rcond=None)[0] / scales
        if (x >= 0).all():
            return x
        used.remove(min(used, key=lambda i: x[i] * np.abs(rows[:, i]).max()))


# --- the router -------------------------------------------------------------------------------------


def routing_cost(report: Report) -> None:
    """CPU time of a routing decision among many engines, all of which have served sessions."""
    affinity, replicas = Affinity[int](), range(NUM_ENGINES)
    works = [_work(number) for number in range(NUM_DECISIONS)]
    total_s = 0.0
    for key, work in enumerate(works):
        start_s = time.thread_time()
        chosen = affinity.ranked(work, replicas)[0]
        total_s += time.thread_time() - start_s
        affinity.begin(key, work, chosen)
        affinity.end(key - NUM_ENGINES)  # one running group per engine on average
    decision_s = total_s / NUM_DECISIONS
    report.add("router", f"decision among {NUM_ENGINES} engines", decision_s * PER_S["us"], "us")


def _work(number: int) -> Work:
    """A step of one of many sessions."""
    session, step = number // STEPS, number % STEPS + 1
    blocks: Sequence[bytes] = [b"%d.%d" % (session, i) for i in range(step * PROMPT_BLOCKS)]
    return Work(tuple(blocks), len(blocks) * 64, 128)


# --- read back --------------------------------------------------------------------------------------


def measured_costs() -> Costs:
    """Costs in costs.csv and ingress_cost.csv."""
    engine = {row["quantity"]: float(row["value"]) for row in _rows(COSTS)}
    proxy_s, ingress_s, prompt_token_s, completion_token_s = _http_costs()
    return Costs(
        fixed_s=engine["fixed"] / 1e3,
        prompt_token_s=engine["prompt token"] / 1e3,
        completion_token_s=engine["completion token"] / 1e3,
        pair_s=engine["pair of tokens"] / 1e9,
        proxy_s=proxy_s,
        ingress_s=ingress_s,
        ingress_prompt_token_s=prompt_token_s,
        ingress_completion_token_s=completion_token_s,
        route_s=engine[f"decision among {NUM_ENGINES} engines"] / 1e6 / NUM_ENGINES,
    )


def measured_cache_tokens() -> int:
    """Capacity of an engine's prefix cache in costs.csv."""
    return next(int(float(row["value"])) for row in _rows(COSTS) if row["quantity"] == CACHE_SIZE)


def _http_costs() -> tuple[float, float, float, float]:
    """Costs of a request of one group: the proxy's mean, the ingress as a plane through its three shapes."""
    processes: dict[str, dict[str, float]] = {"proxy": {}, "ingress": {}}
    for row in _rows(INGRESS_COST):
        if row["quantity"].endswith("CPU, 1 a request"):
            processes[row["quantity"].split(":")[0]][row["workload"]] = float(row["value"]) / 1e3
    tokens = {row["workload"]: float(row["value"]) for row in _rows(INGRESS_COST) if row["unit"] == "tokens"}
    shapes = [(1.0, float(shape.split()[0][1:]), tokens[shape]) for shape in processes["ingress"]]
    plane_s = np.linalg.solve(shapes, list(processes["ingress"].values()))
    fixed_s, prompt_token_s, completion_token_s = map(float, plane_s)
    return statistics.fmean(processes["proxy"].values()), fixed_s, prompt_token_s, completion_token_s


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


if __name__ == "__main__":
    main()
