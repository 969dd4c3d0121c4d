"""Sections of `make bench`. Each adds its rows to the report; benchmarks/README.md explains them."""

import itertools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx

from benchmarks.engine.baselines import all_logits_bytes, batch_certainties
from benchmarks.meters import (
    free_bytes,
    interleaved_s,
    matmul_flop_per_s,
    median_s,
    needed_flop,
    peak_bytes,
    time_s,
)
from benchmarks.report import Report
from benchmarks.serving.local_server import (
    request_of,
    rules_only_request,
    score,
    score_burst,
    served,
    single_requests_of,
    write_rules_only_recipe,
)
from benchmarks.subject import RECIPE, Subject
from benchmarks.workloads import Shape
from shopr1_service.policy.loaded_policy import LoadedPolicy

WARM_UP = Shape(64, 2, 8)
LOGITS_MEMORY_SHARE = 0.25  # of free memory; a batch whose logits need more is skipped
NUM_SESSION_STEPS = 8
NUM_RULES_RUNS = 9
RULES_GROUPS, RULES_COMPLETIONS = 2, 256  # of a request; 256 completions are the limit of a group


def warm_up(subject: Subject) -> None:
    """Run the engine and both baselines once, so that no section pays for a first call."""
    group = subject.workloads.group(WARM_UP)
    subject.run(group)
    for keeps_all in (False, True):
        batch_certainties(subject.model, group, keeps_all=keeps_all)


def peak(subject: Subject, shape: Shape, report: Report) -> None:
    """Peak memory of the engine on a new prompt."""
    num_bytes = peak_bytes(lambda: subject.run_new_prompt(shape), subject.device)
    report.add(shape, "peak memory above weights", num_bytes / 2**30, "GiB")


def matmul(subject: Subject, report: Report) -> float:
    """Measured peak of matrix products, in FLOP/s."""
    flop_per_s = matmul_flop_per_s(subject.device, subject.model.dtype)
    report.add("machine", "matmul", flop_per_s / 1e12, "TFLOP/s")
    return flop_per_s


def in_process(
    subject: Subject,
    shape: Shape,
    num_runs: int,
    flop_per_s: float,
    report: Report,
    budget_s: float = math.inf,
) -> None:
    """The engine on new and on cached prompts, and the batch that computes only the completions' logits."""
    group = subject.workloads.group(shape)
    subject.run(group)
    engine_s, hit_s, keep_s = interleaved_s(
        num_runs,
        lambda: subject.run_new_prompt(shape),
        lambda: subject.run(group),
        lambda: batch_certainties(subject.model, group, keeps_all=False),
        budget_s=budget_s,
    )
    report.add(shape, "engine", engine_s, "s")
    report.add(shape, "hit", hit_s, "s")
    report.add(shape, "keep", keep_s, "s")
    report.add(shape, "keep / engine", keep_s / engine_s, "x")
    report.add(shape, "ideal", shape.ideal_ratio, "x")
    report.add(shape, "engine / hit", engine_s / hit_s, "x")
    report.add(shape, "share of matmul", needed_flop(subject.model, shape) / engine_s / flop_per_s, "")


def full(subject: Subject, shape: Shape, report: Report) -> None:
    """The batch that computes all logits, where memory suffices."""
    num_bytes = all_logits_bytes(subject.model, shape)
    if num_bytes > LOGITS_MEMORY_SHARE * free_bytes(subject.device):
        print(f"{shape}: skipped the batch with all logits, which takes {num_bytes / 2**30:.1f} GiB")
        return
    group = subject.workloads.group(shape)
    engine_s, full_s = interleaved_s(
        1,
        lambda: subject.run(group),
        lambda: batch_certainties(subject.model, group, keeps_all=True),
    )
    report.add(shape, "full", full_s, "s")
    report.add(shape, "full / engine", full_s / engine_s, "x")


def over_http(
    subject: Subject, shapes: Sequence[Shape], num_runs: int, report: Report, budget_s: float = math.inf
) -> None:
    """The engine behind the HTTP service."""
    with served(subject.settings, subject.policy) as client:
        for shape in shapes:
            _over_http(subject, shape, num_runs, report, client, budget_s)


def _over_http(
    subject: Subject, shape: Shape, num_runs: int, report: Report, client: httpx.Client, budget_s: float
) -> None:
    """The overhead of HTTP, and the cost of a burst of single rollouts against one request."""
    group = subject.workloads.group
    engine_s, http_s, burst_s = interleaved_s(
        num_runs,
        lambda: subject.run_new_prompt(shape),
        lambda: score(client, request_of(group(shape))),
        lambda: score_burst(client, single_requests_of(group(shape))),
        budget_s=budget_s,
    )
    report.add(shape, "http / engine", http_s / engine_s, "x")
    report.add(shape, "burst / http", burst_s / http_s, "x")


def rules_only(subject: Subject, report: Report) -> None:
    """Parser, rules and HTTP: a service whose recipe has no self-certainty."""
    bodies = (rules_only_request(RULES_GROUPS, RULES_COMPLETIONS, number) for number in itertools.count())
    with tempfile.TemporaryDirectory() as directory:
        recipe = write_rules_only_recipe(Path(directory))
        settings = subject.settings.model_copy(update={"recipe": str(recipe)})
        with served(settings, subject.policy) as client:
            rewards = score(client, next(bodies))
            assert all(reward["details"]["self_certainty_nats"] is None for reward in rewards)
            run_s = median_s(NUM_RULES_RUNS, lambda: score(client, next(bodies)))
    report.add("rules only", f"rollouts, {len(rewards)} a request", len(rewards) / run_s, "1/s")


def session(subject: Subject, shape: Shape, report: Report) -> None:
    """Requests of one session: each prompt extends the previous one."""
    without_s = _session_s(subject, subject.uncached_policy, shape)
    with_s = _session_s(subject, subject.policy, shape)
    workload = f"{NUM_SESSION_STEPS} steps to {shape}"
    report.add(workload, "without / with cache", without_s / with_s, "x")


def _session_s(subject: Subject, policy: LoadedPolicy, shape: Shape) -> float:
    prompt_ids = subject.workloads.prompt_ids(shape.P)
    ends = [shape.P * (i + 1) // NUM_SESSION_STEPS for i in range(NUM_SESSION_STEPS)]
    groups = [subject.workloads.group(shape, prompt_ids[:end]) for end in ends]
    return time_s(lambda: [policy.certainties([group], RECIPE.self_certainty) for group in groups])
