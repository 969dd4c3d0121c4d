"""The service on Ray Serve: savings of prefix affinity, overhead of Ray. Run by `make bench-ray`.

benchmarks/README.md explains each row.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from benchmarks.report import Report
from benchmarks.serving.local_server import (
    REQUEST_TIMEOUT_S,
    Body,
    request_of,
    rules_only_request,
    score,
    served,
    wait_until_ready,
    write_rules_only_recipe,
)
from benchmarks.subject import embedded_policy
from benchmarks.workloads import Shape, Workloads
from shopr1_client.errors import ProblemError
from shopr1_service.cluster.application import EngineDeployment, Scale, application
from shopr1_service.cluster.messages import Declined, Route
from shopr1_service.cluster.ray_router import AffinityRouter
from shopr1_service.core import BatchKey, GroupCertainties, TokenGroup
from shopr1_service.policy.loading import choose_device
from shopr1_service.settings import Settings, load_settings

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
NUM_REPLICAS = 2
NUM_SESSIONS, NUM_STEPS = 6, 8
AT_ONCE = (1, 3)
"""Concurrent sessions. Odd, because round robin keeps each of an even number in step on its replica."""
PAGE_TOKENS = 400
ROLLOUTS = Shape(0, 1, 8)
"""Completions of each step."""
OVERHEAD_SHAPES = {"rules only": None, "P200 G4 R16": Shape(200, 4, 16)}
NUM_TIMED = 60
COUNTS = "SHOPR1BENCH_COUNTS"
"""Environment variable: the folder that replicas write their token counts to."""


class CountingEngine(EngineDeployment):
    """Engine that writes its cache hits and misses, in prompt tokens, to a file."""

    async def compute_certainties(
        self, group: TokenGroup, key: BatchKey, route: Route
    ) -> GroupCertainties | ProblemError | Declined:
        measured = await super().compute_certainties(group, key, route)
        cache = self._engine.policy.stats.cache
        counts = {"missed": cache.num_missed_tokens, "hit": cache.num_hit_tokens}
        (Path(os.environ[COUNTS]) / f"{os.getpid()}.json").write_text(json.dumps(counts))
        return measured


class RoundRobinRouter(RequestRouter):  # type: ignore[misc]  # Ray's classes are untyped here
    """Each replica in turn."""

    def initialize_state(self) -> None:
        self._turns: dict[str, int] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        key = pending_request.metadata.internal_request_id
        turn = self._turns.setdefault(key, len(self._turns)) % len(candidate_replicas)
        return [[sorted(candidate_replicas, key=lambda replica: str(replica.replica_id))[turn]]]


def main() -> None:
    parser = argparse.ArgumentParser(description="The service on Ray Serve.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    report = Report(choose_device("auto"), "float32")
    workloads = Workloads(embedded_policy(settings_of()).codec)
    with tempfile.TemporaryDirectory() as directory:
        affinity(workloads, Path(directory), report)
        overhead(workloads, Path(directory), report)
    report.write(options.output / "cluster.csv")


def settings_of(**more: Any) -> Settings:  # noqa: ANN401
    """Settings of a replica in float32, with these in addition."""
    return load_settings({"dtype": "float32", "log_level": "error", "prefix_cache_bytes": 2 * 2**30, **more})


# --- affinity ---------------------------------------------------------------------------------------


def affinity(workloads: Workloads, counts: Path, report: Report) -> None:
    """The same sessions through prefix affinity and through round robin."""
    sessions = [_session(workloads) for _ in range(NUM_SESSIONS)]
    num_completion_tokens = NUM_SESSIONS * NUM_STEPS * sum(map(len, workloads.completions(ROLLOUTS)))
    for num_at_once in AT_ONCE:
        workload = f"{NUM_STEPS} steps, {num_at_once} at once"
        forwarded: dict[str, int] = {}
        for name, router in (("affinity", AffinityRouter), ("round robin", RoundRobinRouter)):
            duration_s, counted = _run_sessions(sessions, num_at_once, router, counts)
            forwarded[name] = counted["missed"] + num_completion_tokens
            report.add(workload, f"{name}: cache hit rate", counted["hit"] / sum(counted.values()), "")
            report.add(workload, f"{name}: forwarded tokens", forwarded[name], "tokens")
            report.add(workload, f"{name}: time", duration_s, "s")
        report.add(workload, "round robin / affinity", forwarded["round robin"] / forwarded["affinity"], "x")


def _run_sessions(
    sessions: Sequence[Sequence[Body]], num_at_once: int, router: type, counts: Path
) -> tuple[float, Mapping[str, int]]:
    """Duration, and the token counts of all replicas together."""
    scale = Scale(num_replicas=NUM_REPLICAS)
    parts = {"router": router, "engine": CountingEngine}
    with on_ray(scale, settings_of(), {COUNTS: str(counts)}, **parts) as client:
        start_s = time.perf_counter()
        with ThreadPoolExecutor(num_at_once) as pool:
            list(pool.map(lambda session: [score(client, body) for body in session], sessions))
        duration_s = time.perf_counter() - start_s
    return duration_s, _pop_counts(counts)


def _session(workloads: Workloads) -> list[Body]:
    prompt_ids = workloads.prompt_ids(NUM_STEPS * PAGE_TOKENS)
    ends = range(PAGE_TOKENS, len(prompt_ids) + 1, PAGE_TOKENS)
    return [request_of(workloads.group(ROLLOUTS, prompt_ids[:end])) for end in ends]


def _pop_counts(counts: Path) -> Mapping[str, int]:
    """Read, sum and delete the counts of all replicas."""
    read = [json.loads(file.read_text()) for file in counts.iterdir() if file.suffix == ".json"]
    for file in counts.iterdir():
        file.unlink()
    return {name: sum(each[name] for each in read) for name in ("missed", "hit")}


# --- overhead ---------------------------------------------------------------------------------------


def overhead(workloads: Workloads, directory: Path, report: Report) -> None:
    """One engine behind `shopr1 serve` and one behind Ray Serve, in alternation."""
    settings = settings_of(recipe=str(write_rules_only_recipe(directory)))
    for workload, shape in OVERHEAD_SHAPES.items():
        own = settings if shape is None else settings_of()
        scale, policy = Scale(num_cpus=os.cpu_count() or 1), embedded_policy(own)
        with served(own, policy) as single, on_ray(scale, own) as cluster:
            bodies = [_body(workloads, shape, i) for i in range(4 * NUM_TIMED)]
            random.Random(0).shuffle(bodies)
            times = [
                (_time_s(single, bodies.pop()), _time_s(cluster, bodies.pop())) for _ in range(NUM_TIMED)
            ]
            single_s, cluster_s = (statistics.median(each) for each in zip(*times, strict=True))
        report.add(workload, "shopr1 serve", 1000 * single_s, "ms")
        report.add(workload, "Ray Serve", 1000 * cluster_s, "ms")
        report.add(workload, "Ray Serve / shopr1 serve", cluster_s / single_s, "x")


def _body(workloads: Workloads, shape: Shape | None, number: int) -> Body:
    if shape is None:
        return rules_only_request(1, 8, number)
    return request_of(workloads.group(shape))


def _time_s(client: httpx.Client, body: Body) -> float:
    start_s = time.perf_counter()
    score(client, body)
    return time.perf_counter() - start_s


@contextlib.contextmanager
def on_ray(
    scale: Scale,
    settings: Settings,
    env_vars: Mapping[str, str] | None = None,
    **parts: Any,  # noqa: ANN401
) -> Iterator[httpx.Client]:
    """Client of the application on a Ray cluster of its own.

    Args:
        env_vars: of the replicas, in addition.
        parts: classes that replace the application's own.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # Replicas import the package `benchmarks`, which is not installed.
    ray.init(
        address="local",  # never an existing cluster
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), **(env_vars or {})}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(scale, settings, **parts), name="shopr1", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=REQUEST_TIMEOUT_S) as client:
            wait_until_ready(client)
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
