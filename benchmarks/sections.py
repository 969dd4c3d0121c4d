"""What a run measures. Each section notes its rows; README.md says what they mean."""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx

from baselines import all_logits_bytes, batch_certainties
from meters import (
    free_bytes,
    in_turns_s,
    matmul_flop_per_s,
    median_s,
    needed_flop,
    peak_bytes,
    time_s,
)
from report import Report
from serving import (
    lone_requests_of,
    request_of,
    rules_only_request,
    score,
    score_burst,
    served,
    write_rules_only_recipe,
)
from shopr1_service.policy.local import LoadedPolicy
from subject import RECIPE, Subject
from workloads import Shape

WARM_UP = Shape(64, 2, 8)
LOGITS_MEMORY_SHARE = 0.25  # of what is free; beyond, a batch with all logits is not tried
NUM_SESSION_STEPS = 8
NUM_RULES_RUNS = 9
RULES_GROUPS, RULES_COMPLETIONS = 2, 256  # of a request; a group takes no more completions


def warm_up(subject: Subject) -> None:
    group = subject.workloads.group(WARM_UP)
    subject.measure(group)
    for keeps_all in (False, True):
        batch_certainties(subject.model, group, keeps_all=keeps_all)


def peak(subject: Subject, shape: Shape, report: Report) -> None:
    num_bytes = peak_bytes(lambda: subject.measure_unknown(shape), subject.device)
    report.note(shape, "peak memory above weights", num_bytes / 2**30, "GiB")


def matmul(subject: Subject, report: Report) -> float:
    """What the device does at most, in FLOP/s."""
    flop_per_s = matmul_flop_per_s(subject.device, subject.model.dtype)
    report.note("machine", "matmul", flop_per_s / 1e12, "TFLOP/s")
    return flop_per_s


def in_process(subject: Subject, shape: Shape, num_runs: int, flop_per_s: float, report: Report) -> None:
    """The engine on unknown and known prompts, and the batch that makes the completions' logits only."""
    group = subject.workloads.group(shape)
    subject.measure(group)
    engine_s, hit_s, keep_s = in_turns_s(
        num_runs,
        lambda: subject.measure_unknown(shape),
        lambda: subject.measure(group),
        lambda: batch_certainties(subject.model, group, keeps_all=False),
    )
    report.note(shape, "engine", engine_s, "s")
    report.note(shape, "hit", hit_s, "s")
    report.note(shape, "keep", keep_s, "s")
    report.note(shape, "keep / engine", keep_s / engine_s, "x")
    report.note(shape, "ideal", shape.ideal_ratio, "x")
    report.note(shape, "engine / hit", engine_s / hit_s, "x")
    report.note(shape, "share of matmul", needed_flop(subject.model, shape) / engine_s / flop_per_s, "")


def full(subject: Subject, shape: Shape, report: Report) -> None:
    """The batch that makes all logits, where memory suffices."""
    num_bytes = all_logits_bytes(subject.model, shape)
    if num_bytes > LOGITS_MEMORY_SHARE * free_bytes(subject.device):
        print(f"{shape}: no batch with all logits, they take {num_bytes / 2**30:.1f} GiB")
        return
    group = subject.workloads.group(shape)
    engine_s, full_s = in_turns_s(
        1,
        lambda: subject.measure(group),
        lambda: batch_certainties(subject.model, group, keeps_all=True),
    )
    report.note(shape, "full", full_s, "s")
    report.note(shape, "full / engine", full_s / engine_s, "x")


def over_http(subject: Subject, shapes: Sequence[Shape], num_runs: int, report: Report) -> None:
    with served(subject.settings, subject.policy) as client:
        for shape in shapes:
            _over_http(subject, shape, num_runs, report, client)


def _over_http(subject: Subject, shape: Shape, num_runs: int, report: Report, client: httpx.Client) -> None:
    """What HTTP adds, and what a burst of lone rollouts costs against one request."""
    group = subject.workloads.group
    engine_s, http_s, burst_s = in_turns_s(
        num_runs,
        lambda: subject.measure_unknown(shape),
        lambda: score(client, request_of(group(shape))),
        lambda: score_burst(client, lone_requests_of(group(shape))),
    )
    report.note(shape, "http / engine", http_s / engine_s, "x")
    report.note(shape, "burst / http", burst_s / http_s, "x")


def rules_only(subject: Subject, report: Report) -> None:
    """The parser, the rules and HTTP: a service whose recipe does not ask for self-certainty."""
    bodies = (rules_only_request(RULES_GROUPS, RULES_COMPLETIONS, number) for number in itertools.count())
    with tempfile.TemporaryDirectory() as directory:
        recipe = write_rules_only_recipe(Path(directory))
        settings = subject.settings.model_copy(update={"recipe": str(recipe)})
        with served(settings, subject.policy) as client:
            rewards = score(client, next(bodies))
            assert all(reward["details"]["self_certainty_nats"] is None for reward in rewards)
            run_s = median_s(NUM_RULES_RUNS, lambda: score(client, next(bodies)))
    report.note("rules only", f"rollouts, {len(rewards)} a request", len(rewards) / run_s, "1/s")


def session(subject: Subject, shape: Shape, report: Report) -> None:
    """Requests whose prompts each begin with the last one's."""
    without_s = _session_s(subject, subject.bare_policy, shape)
    with_s = _session_s(subject, subject.policy, shape)
    workload = f"{NUM_SESSION_STEPS} steps to {shape}"
    report.note(workload, "without / with cache", without_s / with_s, "x")


def _session_s(subject: Subject, policy: LoadedPolicy, shape: Shape) -> float:
    prompt_ids = subject.workloads.prompt_ids(shape.P)
    ends = [shape.P * (i + 1) // NUM_SESSION_STEPS for i in range(NUM_SESSION_STEPS)]
    groups = [subject.workloads.group(shape, prompt_ids[:end]) for end in ends]
    return time_s(lambda: [policy.certainties([group], RECIPE.self_certainty) for group in groups])
