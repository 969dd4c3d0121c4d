"""The same groups through vLLM, in an interpreter that has it."""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.meters import time_s
from benchmarks.report import Report
from benchmarks.subject import Subject
from benchmarks.workloads import Shape
from shopr1_service.core import TokenGroup

SCRIPT = Path(__file__).with_name("vllm_baseline.py")
TIMEOUT_S = 3600.0  # on a CPU vLLM compiles for minutes first
NUM_SAMPLED_TOKENS = 1  # vLLM always samples one
NUM_ERROR_LINES = 20


def vllm_column(
    subject: Subject, shapes: Sequence[Shape], num_runs: int, python: str, report: Report
) -> None:
    """Log-probabilities of the most likely tokens by vLLM, against the engine; no prompt is cached."""
    groups = [subject.workloads.group(shape) for shape in shapes for _ in range(num_runs)]
    result = _run(python, subject, groups)
    for i, shape in enumerate(shapes):
        runs = slice(i * num_runs, (i + 1) * num_runs)
        vllm_s = statistics.median(result["seconds"][runs])
        engine_s = statistics.median(time_s(partial(subject.run, group)) for group in groups[runs])
        report.add(shape, f"vllm {result['version']}", vllm_s, "s")
        report.add(shape, "vllm / engine", vllm_s / engine_s, "x")


def _run(python: str, subject: Subject, groups: Sequence[TokenGroup]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        subject.model.save_pretrained(directory)
        subject.tokenizer.save_pretrained(directory)
        job = _job(directory, subject, groups)
        # -P: vLLM must not import modules from this folder.
        command = [python, "-P", str(SCRIPT)]
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    if done.returncode:
        last_lines = done.stderr.splitlines()[-NUM_ERROR_LINES:]
        raise RuntimeError("vLLM failed:\n" + "\n".join(last_lines))
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _job(directory: str, subject: Subject, groups: Sequence[TokenGroup]) -> dict[str, Any]:
    listed = [
        {"prompt_ids": list(group.prompt_ids), "completions": [list(c.ids) for c in group.completions]}
        for group in groups
    ]
    lengths = [len(group.prompt_ids) + len(c.ids) for group in groups for c in group.completions]
    return {
        "model": directory,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "max_tokens": max(lengths) + NUM_SAMPLED_TOKENS,
        "groups": listed,
    }
