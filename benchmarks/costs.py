"""What one engine costs, for the simulation: a pass, a token, a token that looks at another one.

One thread, as an engine with a core of its own has it, and its CPU time: what else runs on the machine counts
for little. Least squares over passes of different shapes, in relative errors. Run by `make bench-simulation`.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from report import Report
from shopr1_service.cluster.prefix_affinity import Affinity, Work
from shopr1_service.policy import factory as building
from shopr1_service.policy import loading as source
from shopr1_service.policy.loading import choose_device
from shopr1_service.policy.local import LoadedPolicy
from shopr1_service.settings import load_settings
from subject import RECIPE, load_model
from workloads import Shape, Workloads

FOLDER = Path(__file__).parent
NUM_RUNS = 2
NAMES = ("fixed", "prompt token", "completion token", "pair of tokens")
UNITS = ("ms", "ms", "ms", "ns")
PER_S = {"ms": 1e3, "us": 1e6, "ns": 1e9}
KEPT, CACHE_BYTES, KEPT_TOKENS = "kept in 2 GiB", 2**31, 64
NUM_ENGINES, NUM_DECISIONS = 256, 2000
PROMPT_BLOCKS, STEPS = 16, 8


@dataclass(frozen=True)
class Pass:
    """What is passed through the engine: P of the shape are missing, behind `num_kept` that are kept."""

    num_kept: int
    shape: Shape

    def __str__(self) -> str:
        return f"{self.num_kept} kept, {self.shape}"


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
    parser = argparse.ArgumentParser(description="What one engine costs.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(choose_device("cpu"), "float32")
    engine(report)
    routing(report)
    report.write(options.output / "costs.csv")


def engine(report: Report) -> None:
    settings = load_settings({"dtype": "float32"})
    tokenizer, model = load_model(settings)
    policy = building.build_policy(model, tokenizer, settings, name=source.EMBEDDED_NAME)
    torch.set_num_threads(1)
    workloads = Workloads(policy.codec)
    sizes, times_s = list[tuple[int, int, int]](), list[float]()
    for each in PASSES:
        num_own = sum(map(len, workloads.completions(each.shape)))
        sizes.append((each.num_kept, each.shape.P, num_own))
        times_s.append(min(_pass_s(policy, workloads, each) for _ in range(NUM_RUNS)))
        report.note(each, "engine", times_s[-1], "s")
    report.note("one engine", KEPT, CACHE_BYTES / _bytes_a_token(policy, workloads), "tokens")
    _note_fit(np.array([features(*size) for size in sizes]), np.array(times_s), report)


def features(num_kept: int, num_missing: int, num_own: int) -> tuple[float, ...]:
    """What the cost of a pass is linear in; completions look at the prompt, and hardly at each other."""
    pairs = num_missing * (num_kept + num_missing / 2) + num_own * (num_kept + num_missing)
    return 1.0, num_missing, num_own, pairs


def _pass_s(policy: LoadedPolicy, workloads: Workloads, each: Pass) -> float:
    prompt_ids = workloads.prompt_ids(each.num_kept + each.shape.P)
    if each.num_kept:
        known = workloads.group(Shape(each.num_kept, 1, 4), prompt_ids[: each.num_kept])
        policy.certainties([known], RECIPE.self_certainty)
    group = workloads.group(each.shape, prompt_ids)
    start_s = time.thread_time()
    policy.certainties([group], RECIPE.self_certainty)
    return time.thread_time() - start_s


def _bytes_a_token(policy: LoadedPolicy, workloads: Workloads) -> float:
    before = policy.stats.cache.num_bytes
    policy.certainties([workloads.group(Shape(KEPT_TOKENS, 1, 4))], RECIPE.self_certainty)
    return (policy.stats.cache.num_bytes - before) / KEPT_TOKENS


def _note_fit(rows: np.ndarray, times_s: np.ndarray, report: Report) -> None:
    costs_s = nonnegative_fit(rows / times_s[:, None])
    for name, unit, cost_s in zip(NAMES, UNITS, costs_s, strict=True):
        report.note("one engine", name, cost_s * PER_S[unit], unit)
    errors = np.abs(rows @ costs_s / times_s - 1)
    report.note("one engine", "largest error of the fit", float(errors.max()), "")


def nonnegative_fit(rows: np.ndarray) -> np.ndarray:
    """Numbers x ≥ 0 for which rows · x is closest to 1; what would be negative is 0, the worst first."""
    used = list(range(rows.shape[1]))
    while True:
        x = np.zeros(rows.shape[1])
        # Columns are brought to one scale first: pairs are a million times as many as passes.
        scales = np.abs(rows[:, used]).max(axis=0)
        x[used] = np.linalg.lstsq(rows[:, used] / scales, np.ones(len(rows)), rcond=None)[0] / scales
        if (x >= 0).all():
            return x
        used.remove(min(used, key=lambda i: x[i] * np.abs(rows[:, i]).max()))


# --- the router -------------------------------------------------------------------------------------


def routing(report: Report) -> None:
    """A decision among many engines that have each worked on sessions."""
    affinity, replicas = Affinity[int](), range(NUM_ENGINES)
    works = [_work(number) for number in range(NUM_DECISIONS)]
    taken_s = 0.0
    for key, work in enumerate(works):
        start_s = time.thread_time()
        chosen = affinity.ranked(work, replicas)[0]
        taken_s += time.thread_time() - start_s
        affinity.begin(key, work, chosen)
        affinity.end(key - NUM_ENGINES)  # so many are under way
    decision_s = taken_s / NUM_DECISIONS
    report.note("router", f"decision among {NUM_ENGINES} engines", decision_s * PER_S["us"], "us")


def _work(number: int) -> Work:
    """A step of one of many sessions."""
    session, step = number // STEPS, number % STEPS + 1
    blocks: Sequence[bytes] = [b"%d.%d" % (session, i) for i in range(step * PROMPT_BLOCKS)]
    return Work(tuple(blocks), len(blocks) * 64, 128)


if __name__ == "__main__":
    main()
