"""A session, with and without the prefix cache: `python -m benchmarks.serving.session [--before CHECKOUT]`.

Each step's prompt extends the one before it. A number is the CPU time of the service's process, on one
thread, for all steps, one request each; services take turns. The policy has one random layer of the shape of
SmolLM2-135M's 30, and a vocabulary in proportion. Writes session.csv.
"""

import argparse
import random
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.report import Report
from benchmarks.serving.builds import Service, builds, service_of
from benchmarks.serving.local_server import Body, score
from benchmarks.workloads import Shape
from tests.support.models import tiny_model
from tests.support.updating import saved

FOLDER = Path(__file__).parent
NUM_STEPS = 8
NUM_LAYERS, NUM_LAYERS_OF_SMOLLM2 = 1, 30
SIZES = {
    "vocab_size": 49_152 * NUM_LAYERS // NUM_LAYERS_OF_SMOLLM2,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "initializer_range": 0.04,
}
SHAPES, TINY_SHAPES = (Shape(6000, 8, 64), Shape(6000, 1, 64)), (Shape(80, 2, 8),)
CACHES = {"with": 2**31, "without": 0}
"""Bytes of the prefix cache."""
LETTERS = "JKQVXZ"
"""Each is a token."""


def main() -> None:
    parser = argparse.ArgumentParser(description="A session with and without the prefix cache.")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier build, to compare with")
    parser.add_argument("--runs", type=int, default=5, help="runs, of which the median is reported")
    parser.add_argument("--tiny", action="store_true", help="a short session that shows that everything runs")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    report = Report(torch.device("cpu"), "float32")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        policy = saved(Path(directory), tiny_model(**SIZES))
        services = {
            (build, cache): stack.enter_context(
                service_of(path, {"policy": policy, "prefix_cache_bytes": num_bytes})
            )
            for build, path in builds(options.before).items()
            for cache, num_bytes in CACHES.items()
        }
        for shape in TINY_SHAPES if options.tiny else SHAPES:
            sessions(services, shape, options.runs, report)
    report.write(options.output / "session.csv")


def sessions(services: dict[tuple[str, str], Service], shape: Shape, num_runs: int, report: Report) -> None:
    """Add the time of a session in each build, with and without the cache."""
    rounds = [[_session_s(service, shape) for service in services.values()] for _ in range(num_runs)]
    medians = map(statistics.median, zip(*rounds, strict=True))
    times_s = dict(zip(services, medians, strict=True))
    workload = f"{NUM_STEPS} steps to {shape}"
    for (build, cache), time_s in times_s.items():
        report.add(workload, f"{build}: {cache} cache", time_s, "s")
    for build in dict.fromkeys(build for build, _ in services):
        ratio = times_s[build, "without"] / times_s[build, "with"]
        report.add(workload, f"{build}: without / with cache", ratio, "x")


def _session_s(service: Service, shape: Shape) -> float:
    bodies = _bodies(shape)
    start_s = service.cpu_s()
    for body in bodies:
        score(service.client, body)
    return service.cpu_s() - start_s


def _bodies(shape: Shape) -> list[Body]:
    ids = [random.randrange(100, 340) for _ in range(shape.P)]
    return [_body(ids[: shape.P * step // NUM_STEPS], shape) for step in range(1, NUM_STEPS + 1)]


def _body(prompt_ids: list[int], shape: Shape) -> Body:
    completions = [
        f'{{"rationale": "{"".join(random.choices(LETTERS, k=shape.R))}", "action": {{"type": "terminate"}}}}'
        for _ in range(shape.G)
    ]
    prompt = {"token_ids": prompt_ids}
    return {"groups": [{"prompt": prompt, "ground_truth": {"type": "terminate"}, "completions": completions}]}


if __name__ == "__main__":
    main()
