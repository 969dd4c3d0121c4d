"""CPU time of the HTTP side of the service on Ray Serve, per group. Run by `make bench-ray`.

The engine returns constants immediately, so that only the path to it remains. CPU time, unlike latency, gives
the rate at which a process saturates, and other work on the machine adds little to it.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from benchmarks.report import Report
from benchmarks.serving.local_server import Body, score
from benchmarks.serving.ray_serve import on_ray, settings_of
from benchmarks.subject import embedded_policy
from benchmarks.workloads import Shape, Workloads
from shopr1_service.cluster.application import EngineDeployment, Scale
from shopr1_service.cluster.messages import Route
from shopr1_service.core import BatchKey, Certainty, GroupCertainties, TokenGroup
from shopr1_service.policy.loading import choose_device
from shopr1_service.policy.prompts.tokenizer import Codec

FOLDER = Path(__file__).parent
SHAPES = (Shape(250, 1, 32), Shape(250, 8, 32), Shape(4000, 8, 32))
NUM_GROUPS, NUM_AT_ONCE = 256, 4
GROUPS_PER_REQUEST = (1, 32)
PROCESSES = {"proxy": "ray::ProxyActor", "ingress": "ray::ServeReplica:shopr1:Ingress"}
TICKS_S = os.sysconf("SC_CLK_TCK")


class InstantEngine(EngineDeployment):
    """Engine that returns constants immediately."""

    async def compute_certainties(self, group: TokenGroup, key: BatchKey, _route: Route) -> GroupCertainties:
        values = [Certainty((1.0,) * len(completion.measured)) for completion in group.completions]
        return GroupCertainties(values, self._engine.versions.find(key.target))


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of the HTTP side.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    report = Report(choose_device("auto"), "float32")
    codec = embedded_policy(settings_of()).codec
    with on_ray(Scale(), settings_of(), engine=InstantEngine) as client:
        ingress_cost(client, codec, report)
    report.write(options.output / "ingress_cost.csv")


def ingress_cost(client: httpx.Client, codec: Codec, report: Report) -> None:
    """Groups as text, one and several per request."""
    workloads = Workloads(codec)
    for shape in SHAPES:
        report.add(shape, "completions", sum(map(len, workloads.completions(shape))), "tokens")
        for num_groups in GROUPS_PER_REQUEST:
            bodies = list(_bodies(workloads, codec, shape, num_groups))
            _send(client, bodies[:NUM_AT_ONCE])
            bodies = bodies[NUM_AT_ONCE:]
            before_s = _cpu_s()
            _send(client, bodies)
            for name, after_s in _cpu_s().items():
                each_s = (after_s - before_s[name]) / (len(bodies) * num_groups)
                report.add(shape, f"{name}: CPU, {num_groups} a request", 1000 * each_s, "ms/group")


def _send(client: httpx.Client, bodies: Sequence[Body]) -> None:
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        list(pool.map(lambda body: score(client, body), bodies))


def _bodies(workloads: Workloads, codec: Codec, shape: Shape, num_groups: int) -> Iterator[Body]:
    for _ in range(NUM_AT_ONCE + NUM_GROUPS // num_groups):
        yield {"groups": [_group(workloads, codec, shape) for _ in range(num_groups)]}


def _group(workloads: Workloads, codec: Codec, shape: Shape) -> Body:
    completions = [codec.decode(ids).text for ids in workloads.completions(shape)]
    prompt = codec.decode(workloads.prompt_ids(shape.P)).text
    return {"prompt": prompt, "ground_truth": {"type": "terminate"}, "completions": completions}


def _cpu_s() -> Mapping[str, float]:
    """CPU time of each process of the HTTP side since its start."""
    return {name: sum(map(_process_cpu_s, _processes(title))) for name, title in PROCESSES.items()}


def _processes(title: str) -> Iterator[Path]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:  # the process has just ended
            continue
        if command.startswith(title.encode()) and os.getpid() in _ancestors(folder):
            yield folder


def _ancestors(folder: Path) -> Iterator[int]:
    """Ancestors of a process. They tell our Ray processes from those of others."""
    while (parent := int(_stat(folder)[1])) > 1:
        yield parent
        folder = folder.with_name(str(parent))


def _stat(folder: Path) -> Sequence[str]:
    """Fields of /proc/PID/stat after the name of the process."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _process_cpu_s(folder: Path) -> float:
    user, system = map(int, _stat(folder)[11:13])
    return (user + system) / TICKS_S


if __name__ == "__main__":
    main()
