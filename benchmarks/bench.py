"""How long exact self-certainty takes, against what people do today. Run by `make bench`.

Everything is measured in one run on the embedded policy, and stated as ratios: absolute times of a shared
machine mean little. README.md says what each row means.
"""

import argparse
import importlib.util
from pathlib import Path

import sections
from accuracy import accuracy
from growth import measure_growth
from report import Report
from shopr1_service.policy.loading import choose_device
from subject import Subject, load_subject
from trainer_burst import trainer_burst
from vllm_column import vllm_column
from workloads import PLANS, Plan

FOLDER = Path(__file__).parent


def main() -> None:
    options = _options()
    subject, plan = _load(options)
    report = Report(subject.device, options.dtype)
    sections.warm_up(subject)
    if options.growth:
        _growth(subject, plan, options, report)
        report.write(options.output / "growth.csv")
    elif options.burst:
        trainer_burst(subject, options.runs, report)
        report.write(options.output / "burst.csv")
    else:
        _speed(subject, plan, options, report)
        report.write(options.output / "results.csv")
        if options.vllm:
            vllm_column(subject, plan.in_process, options.runs, options.vllm, report)
            report.write(options.output / "results.csv")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed against what people do today.")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--runs", type=int, default=3, help="times of which the median is taken")
    parser.add_argument("--large", action="store_true", help="also the longest prompt: minutes on a CPU")
    parser.add_argument("--growth", action="store_true", help="instead: cost by completions and by prompt")
    parser.add_argument("--burst", action="store_true", help="instead: a batch as trainers send it")
    parser.add_argument("--vllm", metavar="PYTHON", help="also vLLM, in this interpreter, which has it")
    parser.add_argument("--tiny", action="store_true", help="shapes that only show that everything runs")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    if options.growth and importlib.util.find_spec("matplotlib") is None:
        parser.error("--growth draws with matplotlib: pip install -e '.[bench]'")
    return options


def _load(options: argparse.Namespace) -> tuple[Subject, Plan]:
    """The policy, ready for the shapes that its device is up to."""
    device_type = choose_device("auto").type
    plan = PLANS["tiny" if options.tiny else device_type]
    return load_subject(options.dtype, plan), plan


def _speed(subject: Subject, plan: Plan, options: argparse.Namespace, report: Report) -> None:
    flop_per_s = sections.matmul(subject, report)
    sections.peak(subject, plan.peak, report)
    for shape in plan.in_process:
        sections.in_process(subject, shape, options.runs, flop_per_s, report)
        sections.full(subject, shape, report)
    if options.large:
        sections.in_process(subject, plan.large, 1, flop_per_s, report)
    sections.over_http(subject, plan.http, options.runs, report)
    sections.rules_only(subject, report)
    for shape in plan.sessions:
        sections.session(subject, shape, report)
    accuracy(subject, report)


def _growth(subject: Subject, plan: Plan, options: argparse.Namespace, report: Report) -> None:
    from plots import draw_by_completions, draw_by_prompt  # only here is matplotlib needed

    policy = f"{subject.policy.info.model}, {options.dtype}, {report.device_name}"
    points = measure_growth(subject, plan, options.runs, report)
    draw_by_completions([points[shape] for shape in plan.by_completions], policy, options.output)
    draw_by_prompt([points[shape] for shape in plan.by_prompt], policy, options.output)


if __name__ == "__main__":
    main()
