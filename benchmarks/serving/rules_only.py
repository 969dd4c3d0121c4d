"""Everything but the model, against another checkout: rules alone, and rollouts that are sent one by one.

Run as `python -m benchmarks.serving.rules_only OTHER`, a checkout of the build to compare with, which has
its own `.venv` or runs with this one's packages. Both services run at the same time, each in a process of
its own, and are measured in turn. CPU time, unlike latency, gives the rate at which a process saturates, and
other work on the machine adds little to it.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Report
from benchmarks.serving.local_server import (
    READY_TIMEOUT_S,
    REQUEST_TIMEOUT_S,
    rules_only_request,
)

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
SESSIONS = ROOT / "examples" / "sessions.jsonl"
SCORE, OPENRLHF, SLIME = "/score", "/dialects/openrlhf/get_reward", "/dialects/slime/reward"
NUM_ROLLOUTS = 512
"""Rollouts in a large request."""
NUM_LARGE, NUM_LONE = 10, 100
"""Requests of a round."""
NUM_TINY = 2

Bodies = Iterator[bytes]


@dataclass(frozen=True)
class Workload:
    """Requests to one route, all different: none is answered from another's result."""

    name: str
    route: str
    bodies: Callable[[], Bodies]
    num_requests: int
    num_rollouts: int
    """Rollouts in a request."""


def main() -> None:
    parser = argparse.ArgumentParser(description="The service without a model, against another checkout.")
    parser.add_argument("other", type=Path, help="a checkout")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, of which the medians are reported")
    parser.add_argument(
        "--tiny", action="store_true", help="two requests a round, to show that everything runs"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    report = Report(torch.device("cpu"), "float32")
    with served(options.other.resolve()) as old, served(ROOT) as new:
        for workload in workloads(NUM_TINY if options.tiny else None):
            compare(workload, (old, new), options.rounds, report)
    report.write(options.output / "rules_only.csv")


class Served:
    """A service in a process of its own."""

    def __init__(self, port: int, pid: int) -> None:
        self._clock = ~pid << 3 | 2  # as of clock_getcpuclockid(3): the system's ticks are 10 ms
        self._port = port

    def cpu_s(self) -> float:
        """CPU time of the process since its start."""
        return time.clock_gettime(self._clock)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_TIMEOUT_S)


@contextlib.contextmanager
def served(checkout: Path) -> Iterator[Served]:
    """A service of a checkout's code. It ends with the block."""
    python = checkout / ".venv" / "bin" / "python"
    paths = os.pathsep.join(str(checkout / part) for part in ("rewards", "service", "clients"))
    interpreter = str(python) if python.exists() else sys.executable
    command = [interpreter, str(FOLDER / "instant_server.py")]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        service = Served(int(process.stdout.readline()), process.pid)
        try:
            wait_until_ready(service)
            yield service
        finally:
            process.stdin.close()


def wait_until_ready(service: Served) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), contextlib.closing(service.connect()) as connection:
            connection.request("GET", "/health/ready")
            if connection.getresponse().status == http.client.OK:
                return
        time.sleep(0.05)
    raise TimeoutError("the service did not become ready")


def compare(workload: Workload, services: Sequence[Served], num_rounds: int, report: Report) -> None:
    """Add CPU times and rates of both services, and how many times the new one is faster."""
    bodies = workload.bodies()
    measured: list[list[tuple[float, float]]] = [[], []]
    for _ in range(num_rounds + 1):
        sent = list(itertools.islice(bodies, workload.num_requests))
        answers = []
        for service, results in zip(services, measured, strict=True):
            cpu_s, wall_s, answered = run(service, workload.route, sent)
            results.append((cpu_s / len(sent), wall_s / len(sent)))
            answers.append(answered)
        assert answers[0] == answers[1], "the rewards differ"
    # The first round warms up.
    (old_cpu_s, old_s), (new_cpu_s, new_s) = (
        map(statistics.median, zip(*m[1:], strict=True)) for m in measured
    )
    pairs = list(zip(*measured, strict=True))[1:]
    name, num_rollouts = workload.name, workload.num_rollouts
    for build, cpu_s, wall_s in (("before", old_cpu_s, old_s), ("now", new_cpu_s, new_s)):
        report.add(name, f"{build}: CPU", 1e6 * cpu_s / num_rollouts, "us/rollout")
        report.add(name, f"{build}: rollouts", num_rollouts / wall_s, "1/s")
    report.add(name, "CPU, before / now", statistics.median(old[0] / new[0] for old, new in pairs), "x")
    report.add(
        name, "rollouts/s, now / before", statistics.median(old[1] / new[1] for old, new in pairs), "x"
    )


def run(service: Served, route: str, bodies: Sequence[bytes]) -> tuple[float, float, list[Any]]:
    """CPU time of the service, time, and the rewards."""
    before_cpu_s, before_s = service.cpu_s(), time.perf_counter()
    contents = [send(service, route, body) for body in bodies]
    wall_s, cpu_s = time.perf_counter() - before_s, service.cpu_s() - before_cpu_s
    return cpu_s, wall_s, [_rewards(json.loads(content)) for content in contents]


def send(service: Served, route: str, body: bytes) -> bytes:
    """The answer to a request on a connection of its own, as most trainers send them."""
    with contextlib.closing(service.connect()) as connection:
        connection.request("POST", route, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    assert response.status == http.client.OK, content
    return content


def _rewards(answer: Any) -> Any:  # noqa: ANN401  # any route's
    if isinstance(answer, dict) and "groups" in answer:
        return [[reward["reward"] for reward in group["rewards"]] for group in answer["groups"]]
    return answer["rewards"] if isinstance(answer, dict) else answer


# --- workloads --------------------------------------------------------------------------------------


def workloads(num_requests: int | None) -> Iterator[Workload]:
    large, lone = num_requests or NUM_LARGE, num_requests or NUM_LONE
    yield Workload("2 groups of 256", SCORE, lambda: _synthetic(2, 256), large, NUM_ROLLOUTS)
    yield Workload("64 groups of 8", SCORE, lambda: _synthetic(64, 8), large, NUM_ROLLOUTS)
    yield Workload("examples, changed", SCORE, _of_examples, large, NUM_ROLLOUTS)
    yield Workload("one rollout, /score", SCORE, lambda: _synthetic(1, 1), lone, 1)
    yield Workload("one rollout, OpenRLHF", OPENRLHF, _openrlhf, lone, 1)
    yield Workload("one rollout, slime", SLIME, _slime, lone, 1)


def _synthetic(num_groups: int, num_completions: int) -> Bodies:
    return (_encoded(rules_only_request(num_groups, num_completions, number)) for number in itertools.count())


def _of_examples() -> Bodies:
    """Groups of 8 of the example sessions. Most completions are changed a little, which breaks some."""
    lines = [json.loads(line) for line in SESSIONS.read_text("utf-8").splitlines()]
    chance = random.Random(1)
    while True:
        groups = []
        for _ in range(NUM_ROLLOUTS // 8):
            line = chance.choice(lines)
            completions = [_changed(chance.choice(line["completions"]), chance) for _ in range(8)]
            groups.append({**line, "prompt": json.dumps(line["prompt"]), "completions": completions})
        yield _encoded({"groups": groups})


def _changed(completion: str, chance: random.Random) -> str:
    words = completion.split(" ")
    words[chance.randrange(len(words))] = chance.choice(words)
    return " ".join(words)


def _openrlhf() -> Bodies:
    for number in itertools.count():
        prompt, truth, completion = _rollout(number)
        yield _encoded({"query": [prompt + completion], "prompts": [prompt], "labels": [json.dumps(truth)]})


def _slime() -> Bodies:
    for number in itertools.count():
        prompt, truth, completion = _rollout(number)
        yield _encoded({"prompt": prompt, "response": completion, "label": truth})


def _rollout(number: int) -> tuple[str, Any, str]:
    [group] = rules_only_request(1, 1, number)["groups"]
    return group["prompt"], group["ground_truth"], group["completions"][0]


def _encoded(body: Any) -> bytes:  # noqa: ANN401  # any route's
    return json.dumps(body).encode()


if __name__ == "__main__":
    main()
