"""Speed of exact self-certainty against the common baselines: `python -m benchmarks.engine.bench [--full]`.

One run measures the embedded policy and reports ratios: absolute times of a shared machine say little.
benchmarks/README.md explains each row.
"""

import argparse
import importlib.util
from pathlib import Path

from benchmarks.engine import sections
from benchmarks.engine.accuracy import accuracy
from benchmarks.engine.growth import measure_growth
from benchmarks.engine.vllm_column import vllm_column
from benchmarks.report import Report
from benchmarks.subject import Subject, load_subject
from benchmarks.workloads import PLANS, QUICK_PLANS, Plan
from shopr1_service.policy.loading import choose_device
from shopr1_service.settings import DType

FOLDER = Path(__file__).parent


def main() -> None:
    options = _options()
    subject, plan = _load(options)
    dtype = str(subject.model.dtype).removeprefix("torch.")
    report = Report(subject.device, dtype)
    sections.warm_up(subject)
    if options.growth:
        _growth(subject, plan, options, report)
        report.write(options.output / "growth.csv")
    else:
        file = options.output / ("results.csv" if options.full else "quick.csv")
        _speed(subject, plan, options, report)
        report.write(file)
        if options.vllm:
            vllm_column(subject, plan.in_process, options.runs, options.vllm, report)
            report.write(file)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed against the common baselines.")
    parser.add_argument(
        "--dtype", default="auto", choices=list(DType), help="auto: as the service chooses for this device"
    )
    parser.add_argument("--runs", type=int, default=3, help="runs, of which the median is reported")
    parser.add_argument("--full", action="store_true", help="all shapes, instead of three minutes")
    parser.add_argument("--growth", action="store_true", help="instead: cost by completions and by prompt")
    parser.add_argument("--vllm", metavar="PYTHON", help="also vLLM, run by this interpreter")
    parser.add_argument("--tiny", action="store_true", help="small shapes that show that everything runs")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    if options.growth and importlib.util.find_spec("matplotlib") is None:
        parser.error("--growth needs matplotlib: pip install -e '.[bench]'")
    return options


def _load(options: argparse.Namespace) -> tuple[Subject, Plan]:
    """The policy, and the plan for its device."""
    device_type = choose_device("auto").type
    if options.tiny:
        plan = PLANS["tiny"]
    else:
        plan = (PLANS if options.full or options.growth else QUICK_PLANS)[device_type]
    return load_subject(options.dtype, plan), plan


def _speed(subject: Subject, plan: Plan, options: argparse.Namespace, report: Report) -> None:
    flop_per_s = sections.matmul(subject, report)
    sections.peak(subject, plan.peak, report)
    for shape in plan.in_process:
        sections.in_process(subject, shape, options.runs, flop_per_s, report, plan.budget_s)
        sections.full(subject, shape, report)
    for shape in plan.large:
        sections.in_process(subject, shape, 1, flop_per_s, report)
    sections.over_http(subject, plan.http, options.runs, report, plan.budget_s)
    sections.rules_only(subject, report)
    for shape in plan.sessions:
        sections.session(subject, shape, report)
    accuracy(subject, report)


def _growth(subject: Subject, plan: Plan, options: argparse.Namespace, report: Report) -> None:
    from benchmarks.engine.plots import draw_by_completions, draw_by_prompt  # only plots need matplotlib

    policy = f"{subject.policy.info.model}, {report.dtype}, {report.device_name}"
    points = measure_growth(subject, plan, options.runs, report)
    draw_by_completions([points[shape] for shape in plan.by_completions], policy, options.output)
    draw_by_prompt([points[shape] for shape in plan.by_prompt], policy, options.output)


if __name__ == "__main__":
    main()
