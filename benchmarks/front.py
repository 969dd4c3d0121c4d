"""What the HTTP side of the service on Ray Serve costs a request, in CPU time: `make bench-ray`.

The engine answers at once with made-up numbers, so that nothing but the way to it is left. CPU time and not
latency: it says at which rate a process is full, and other work on the machine adds little to it.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from cluster import COUNTS, codec, on_ray, settings_of
from report import Report
from serving import Body, score
from shopr1_service.cluster.application import EngineDeployment, Scale
from shopr1_service.cluster.messages import Route
from shopr1_service.core import Certainty, Kind, Measurements, TokenGroup
from shopr1_service.policy.loading import choose_device
from shopr1_service.policy.tokenizer import Codec
from workloads import Shape, Workloads

FOLDER = Path(__file__).parent
SHAPES = (Shape(250, 1, 32), Shape(250, 8, 32), Shape(4000, 8, 32))
NUM_GROUPS, NUM_AT_ONCE = 256, 4
TOGETHER = (1, 32)
"""Groups of a request."""
PROCESSES = {"proxy": "ray::ProxyActor", "ingress": "ray::ServeReplica:shopr1:Ingress"}
TICKS_S = os.sysconf("SC_CLK_TCK")


class InstantEngine(EngineDeployment):
    """An engine that takes no time."""

    async def compute_certainties(self, group: TokenGroup, kind: Kind, _route: Route) -> Measurements:
        values = [Certainty((1.0,) * len(completion.measured)) for completion in group.completions]
        return Measurements(values, self._engine.versions.find(kind.target))


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of the HTTP side.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    report = Report(choose_device("auto"), "float32")
    with tempfile.TemporaryDirectory() as directory:
        os.environ[COUNTS] = directory
        with on_ray(Scale(), settings_of(), engine=InstantEngine) as client:
            front(client, codec(), report)
    report.write(options.output / "front.csv")


def front(client: httpx.Client, tokens: Codec, report: Report) -> None:
    """Groups as text, alone and together."""
    workloads = Workloads(tokens)
    for shape in SHAPES:
        report.note(shape, "completions", sum(map(len, workloads.completions(shape))), "tokens")
        for num_together in TOGETHER:
            bodies = list(_bodies(workloads, tokens, shape, num_together))
            _send(client, bodies[:NUM_AT_ONCE])
            bodies = bodies[NUM_AT_ONCE:]
            before_s = _cpu_s()
            _send(client, bodies)
            for name, after_s in _cpu_s().items():
                each_s = (after_s - before_s[name]) / (len(bodies) * num_together)
                report.note(shape, f"{name}: CPU, {num_together} a request", 1000 * each_s, "ms/group")


def _send(client: httpx.Client, bodies: Sequence[Body]) -> None:
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        list(pool.map(lambda body: score(client, body), bodies))


def _bodies(workloads: Workloads, tokens: Codec, shape: Shape, num_together: int) -> Iterator[Body]:
    for _ in range(NUM_AT_ONCE + NUM_GROUPS // num_together):
        yield {"groups": [_group(workloads, tokens, shape) for _ in range(num_together)]}


def _group(workloads: Workloads, tokens: Codec, shape: Shape) -> Body:
    completions = [tokens.decode(ids).text for ids in workloads.completions(shape)]
    prompt = tokens.decode(workloads.prompt_ids(shape.P)).text
    return {"prompt": prompt, "ground_truth": {"type": "terminate"}, "completions": completions}


def _cpu_s() -> Mapping[str, float]:
    """What each process of the HTTP side has used since it began."""
    return {name: sum(map(_used_s, _processes(title))) for name, title in PROCESSES.items()}


def _processes(title: str) -> Iterator[Path]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if command.startswith(title.encode()) and os.getpid() in _ancestors(folder):
            yield folder


def _ancestors(folder: Path) -> Iterator[int]:
    """Of a process: others may run Ray here, too."""
    while (parent := int(_stat(folder)[1])) > 1:
        yield parent
        folder = folder.with_name(str(parent))


def _stat(folder: Path) -> Sequence[str]:
    """What /proc says behind the name of a process."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _used_s(folder: Path) -> float:
    user, system = map(int, _stat(folder)[11:13])
    return (user + system) / TICKS_S


if __name__ == "__main__":
    main()
