"""Cost of a unit as things grow: `python -m benchmarks.serving.growth [--before CHECKOUT]`.

A service with a tiny random policy, on one thread, gets more and more of one thing after the other. A number
is the CPU time of its process for a unit, the median of rounds in which the builds alternate. Prefixes in the
cache are the matter of `benchmarks.engine.prefix_cache`. Writes growth.csv.
"""

import argparse
import itertools
import random
import statistics
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.report import Report
from benchmarks.serving.builds import Service, builds, service_of
from benchmarks.serving.local_server import Body, score
from tests.support.models import tiny_model
from tests.support.updating import adapter_file, saved

FOLDER = Path(__file__).parent
NUM_ROUNDS = 5
MIN_ROUND_S = 0.1
MAX_RUNS, MAX_ADAPTERS = 1000, 1000
TRUTH = {"type": "terminate"}
_numbers = itertools.count()


class Growing(ABC):
    """A thing that grows.

    Attributes:
        unit: that the cost is of.
    """

    name = ""
    unit = ""
    levels: Sequence[int] = (1, 4, 16, 64, 256)

    def grow(self, service: Service, former: int, n: int) -> None:  # noqa: B027  # most need not
        """Bring a service from one level to the next."""

    @abstractmethod
    def work(self, service: Service, n: int) -> int:
        """Do some work at a level; returns the number of units."""


class Completions(Growing):
    name, unit = "completions of a prompt", "completion"

    def work(self, service: Service, n: int) -> int:
        score(service.client, {"groups": [_group(num_tokens=500, num_completions=n)]})
        return n


class PromptTokens(Growing):
    name, unit = "tokens of a prompt", "token"
    levels = (250, 1000, 4000, 16_000, 32_000)

    def work(self, service: Service, n: int) -> int:
        score(service.client, {"groups": [_group(num_tokens=n, num_completions=1)]})
        return n


class Prompts(Growing):
    name, unit = "prompts at once", "prompt"

    def work(self, service: Service, n: int) -> int:
        score(service.client, {"groups": [_group(num_tokens=64, num_completions=1) for _ in range(n)]})
        return n


class Adapters(Growing):
    name, unit = "adapters", "load and a request"
    levels = (1, 10, 100, 1000)

    def grow(self, service: Service, former: int, n: int) -> None:
        for i in range(former, n):
            self._load(service, i)

    def work(self, service: Service, n: int) -> int:
        i = random.randrange(n)
        self._load(service, i)
        score(service.client, {"groups": [_group(64, 1)], "adapter": f"a{i}"})
        return 1

    def _load(self, service: Service, i: int) -> None:
        service.client.put(f"/policy/adapters/a{i}", content=adapter_file()).raise_for_status()


class Runs(Growing):
    """Each request is of a new run, which beyond `MAX_RUNS` takes the place of the oldest one."""

    name, unit = "runs so far", "request of a new run"
    levels = (10, 100, 1000, 2000)

    def grow(self, service: Service, former: int, n: int) -> None:
        for _ in range(former, n):
            self.work(service, n)

    def work(self, service: Service, n: int) -> int:
        headers = {"X-Run-ID": f"run-{next(_numbers)}"}
        service.client.post("/score", json={"groups": [_group(8, 1)]}, headers=headers).raise_for_status()
        return 1


class Labels(Growing):
    """One label at a time, in place of the same one, and the search for the label of a text.

    The texts have no answer behind the prompt: nothing is computed.
    """

    name, unit = "labels", "label and a text"
    levels = (1, 10, 100, 1000, 10_000)

    def grow(self, service: Service, former: int, n: int) -> None:
        for start in range(former, n, 1000):
            self._put(service, [_page(i) for i in range(start, min(start + 1000, n))])

    def work(self, service: Service, n: int) -> int:
        prompts = [_page(random.randrange(n)) for _ in range(8)]
        for prompt in prompts:
            self._put(service, [prompt])
        body = {"model": "tiny", "messages": [f"{prompt} {next(_numbers)}" for prompt in prompts]}
        url = "/dialects/llama_factory/v1/score/evaluation"
        assert len(service.client.post(url, json=body).raise_for_status().json()["scores"]) == len(prompts)
        return len(prompts)

    def _put(self, service: Service, prompts: Sequence[str]) -> None:
        labels = [{"prompt": prompt, "ground_truth": TRUTH} for prompt in prompts]
        service.client.put("/labels", json={"labels": labels}).raise_for_status()


ALL: Sequence[type[Growing]] = (Completions, PromptTokens, Prompts, Adapters, Runs, Labels)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a unit as things grow.")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier build, to compare with")
    parser.add_argument(
        "--only", nargs="*", default=[kind.__name__ for kind in ALL], help="some of the things"
    )
    parser.add_argument("--tiny", action="store_true", help="two levels each, to show that everything runs")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    report = Report(torch.device("cpu"), "float32")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        policy = saved(Path(directory), tiny_model(max_position_embeddings=40_000))
        settings = {
            "policy": policy,
            "max_adapters": MAX_ADAPTERS,
            "adapter_versions": 1,
            "max_runs": MAX_RUNS,
        }
        services = {
            build: stack.enter_context(service_of(path, settings))
            for build, path in builds(options.before).items()
        }
        for growing in (kind() for kind in ALL if kind.__name__ in options.only):
            measure(growing, growing.levels[:2] if options.tiny else growing.levels, services, report)
    report.write(options.output / "growth.csv")


def measure(growing: Growing, levels: Sequence[int], services: Mapping[str, Service], report: Report) -> None:
    """Add the cost of a unit at each level, in each build."""
    first: dict[str, float] = {}
    for former, n in itertools.pairwise([0, *levels]):
        for build, unit_s in _unit_s(growing, services, former, n).items():
            workload = f"{growing.name}: {n}"
            report.add(workload, f"{build}: a {growing.unit}", unit_s * 1e3, "ms")
            report.add(workload, f"{build}: against the first", unit_s / first.setdefault(build, unit_s), "x")


def _unit_s(growing: Growing, services: Mapping[str, Service], former: int, n: int) -> Mapping[str, float]:
    for service in services.values():
        growing.grow(service, former, n)
        growing.work(service, n)
    rounds = [[_round_s(growing, each, n) for each in services.values()] for _ in range(NUM_ROUNDS)]
    medians_s = (statistics.median(times_s) for times_s in zip(*rounds, strict=True))
    return dict(zip(services, medians_s, strict=True))


def _round_s(growing: Growing, service: Service, n: int) -> float:
    num_units, taken_s, start_s = 0, 0.0, service.cpu_s()
    while taken_s < MIN_ROUND_S:
        num_units += growing.work(service, n)
        taken_s = service.cpu_s() - start_s
    return taken_s / num_units


def _group(num_tokens: int, num_completions: int) -> Body:
    """A group that no cache knows."""
    ids = [random.randrange(100, 340) for _ in range(num_tokens)]
    completions = [_answer() for _ in range(num_completions)]
    return {"prompt": {"token_ids": ids}, "ground_truth": TRUTH, "completions": completions}


def _answer() -> str:
    return f'{{"rationale": "It is number {next(_numbers)}.", "action": {{"type": "terminate"}}}}'


def _page(i: int) -> str:
    """A prompt with a length of its own."""
    return f"page {i} ".ljust(100 + i * 7919 % 10_000, "x")


if __name__ == "__main__":
    main()
