"""Mixed traffic against a real server for minutes: no wrong reward, none lost, and flat memory.

    python -m tests.integration.ops.soak --minutes 10 --seed 0

A server process with a tiny random policy, a small prefix cache and a small queue. Clients send every kind of
request, give up and break off, while weights and adapters change. Each reward is checked against fp64 of the
version that it names. Requests and changes follow from the seed; their timing is the machine's.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.ops.soak.clients import CUT_RUN, RUN, SoakClient, Traffic
from tests.integration.ops.soak.history import ADAPTER_VERSIONS, ADAPTERS, Changer, History
from tests.integration.ops.soak.judge import Judge
from tests.integration.ops.soak.material import MAX_SEQUENCE_TOKENS, TOLERANCE_NATS, write_policies
from tests.support.http import WAIT_S
from tests.support.process import EMBEDDED, Process, process

NUM_CLIENTS = 8
ANSWERS_PER_CHANGE = 40
MAX_SLOPE_MIB = 1.0
"""Most growth of resident memory per 1,000 requests."""
SHORTEST_JUDGED_S = 240.0
"""A shorter soak does not judge memory: allocators and caches fill first."""
SAMPLE_S = 0.5


def settings(root: Path) -> dict[str, str]:
    """Small limits, so that the soak meets all of them."""
    return {
        "SHOPR1_POLICY": str(root / "A"),
        "SHOPR1_POLICY_ROOTS": str(root),
        "SHOPR1_DTYPE": "float32",
        "SHOPR1_MAX_SEQUENCE_TOKENS": str(MAX_SEQUENCE_TOKENS),
        "SHOPR1_PREFIX_CACHE_BYTES": str(2**16),
        "SHOPR1_MAX_QUEUE_TOKENS": "3000",
        "SHOPR1_MAX_CLIENT_MEMORY_BYTES": str(4 * 2**20),
        "SHOPR1_MAX_ADAPTERS": str(len(ADAPTERS)),
        "SHOPR1_ADAPTER_VERSIONS": str(ADAPTER_VERSIONS),
        "SHOPR1_ROLLOUT_LOG": str(root / "rollouts"),
        "OMP_NUM_THREADS": "1",
    }


@dataclass
class Memory:
    """Resident memory of the server by the number of requests."""

    num_requests: list[int] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)

    def slope_mib(self) -> float:
        """MiB per 1,000 requests, by least squares over the last two thirds."""
        first = len(self.rss_bytes) // 3
        fit = statistics.linear_regression(self.num_requests[first:], self.rss_bytes[first:])
        return fit.slope * 1000 / 2**20


@dataclass
class Report:
    """Outcome of a soak."""

    traffic: Traffic
    changer: Changer
    memory: Memory
    duration_s: float

    @property
    def is_good(self) -> bool:
        judges_memory = self.duration_s >= SHORTEST_JUDGED_S
        return not self.traffic.judge.kinds_of_failure and not (
            judges_memory and self.memory.slope_mib() >= MAX_SLOPE_MIB
        )

    def lines(self) -> list[str]:
        traffic, judge, memory = self.traffic, self.traffic.judge, self.memory
        rss = [memory.rss_bytes[i] // 2**20 for i in (0, len(memory.rss_bytes) // 3, -1)]
        kinds = ", ".join(f"{name} {num}" for name, num in sorted(traffic.num_requests.items()))
        return [
            f"{traffic.num_requests.total()} requests in {self.duration_s:.0f} s: {kinds}",
            f"refused and sent again: {dict(traffic.num_retries)}",
            f"{self.changer.num_changes} changes of the policy, {self.changer.num_broken} that were refused",
            f"{judge.num_right} rollouts right within {TOLERANCE_NATS} nats, "
            f"{judge.num_unscorable} of them rightly without a reward",
            f"failures: {dict(judge.kinds_of_failure) or 'none'}",
            *judge.failures,
            f"memory {rss[0]} MiB, {rss[1]} MiB after a third, {rss[2]} MiB at the end: "
            f"{memory.slope_mib():+.2f} MiB per 1,000 requests",
        ]


async def soak(service: Process, root: Path, duration_s: float, seed: int) -> Report:
    """Send all traffic for this long."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=service.url, timeout=WAIT_S, limits=limits) as http:
        history = History()
        traffic = Traffic(service.url, http, history, Judge(history))
        changer = Changer(seed, root, http, history, lambda message: traffic.judge.fail("change", message))
        await traffic.register_labels()
        memory, start_s = Memory(), time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for number in range(NUM_CLIENTS):
                tasks.create_task(SoakClient(traffic, f"{seed}-{number}").run())
            tasks.create_task(_change(traffic, changer))
            while time.monotonic() < start_s + duration_s:
                await asyncio.sleep(SAMPLE_S)
                memory.num_requests.append(traffic.num_requests.total())
                memory.rss_bytes.append(service.rss_bytes())
            traffic.end()
        await check_counts(traffic, root / "rollouts")
    return Report(traffic, changer, memory, time.monotonic() - start_s)


async def _change(traffic: Traffic, changer: Changer) -> None:
    while not traffic.is_over:
        await traffic.wait_for_answers(ANSWERS_PER_CHANGE)
        try:
            await changer.change()
        except httpx.HTTPError as error:  # the state is unknown now
            traffic.judge.fail("change", repr(error))
            return


async def check_counts(traffic: Traffic, rollout_log: Path) -> None:
    """Check that metrics and the rollout log have each answered rollout once, and that the queue is empty."""
    text = (await traffic.http.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    for run in (RUN, CUT_RUN):
        answered = traffic.num_rollouts[run]
        counts = [s.value for s in samples if s.name == "shopr1_rollouts_total" and s.labels["run"] == run]
        logged = await asyncio.to_thread(num_logged, rollout_log, run, answered)
        if not sum(counts) == logged == answered:
            message = f"run {run}: {answered} answered, {sum(counts):.0f} in metrics, {logged} in the log"
            traffic.judge.fail("counted", message)
    if queued := next(s.value for s in samples if s.name == "shopr1_queue_tokens"):
        traffic.judge.fail("lost", f"{queued:.0f} tokens are still queued")


def num_logged(rollout_log: Path, run: str, expected: int) -> int:
    """Lines of a run in the rollout log. They are written after the answers."""
    until_s = time.monotonic() + WAIT_S
    while True:
        files = [file.read_text("utf-8") for file in rollout_log.iterdir()]
        lines = [line for text in files for line in text.split("\n")[:-1]]
        num = len([line for line in lines if json.loads(line)["run"] == run])
        if num >= expected or time.monotonic() > until_s:
            return num
        time.sleep(SAMPLE_S)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_policies(root)
        with process(*EMBEDDED, **settings(root)) as service:
            report = asyncio.run(soak(service, root, given.minutes * 60, given.seed))
    print(*report.lines(), sep="\n")
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
