"""1 to 256 engines, fed with a recorded trace: throughput, waiting, what is kept, and what is full first.

Nothing is computed by a model here: what things take is read from costs.csv and front.csv, or given.
README.md has the assumptions. Run by `make bench-simulation`.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from report import Report
from shopr1_service.cluster.affinity import Affinity
from simulated_cluster import Cluster, RoundRobin, Router, Sessions, Size, run_closed, run_open
from simulated_costs import measured_costs, measured_kept_tokens
from simulated_engine import Costs, Group
from traces import TRACE, Request, read_trace

FOLDER = Path(__file__).parent
REPLICAS = tuple(2**i for i in range(9))
ROUTERS: Mapping[str, Callable[[], Router]] = {
    "affinity": Affinity,
    "affinity, missing twice": partial(Affinity, missing_weight=2),
    "round robin": RoundRobin,
}
LOADS = (0.4, 0.8)
"""Of what engines could do that keep all and never wait."""
AT_ONCE = 4
"""Sessions of each engine, where everything is to be full."""
SESSIONS_EACH, MIN_SESSIONS = 8, 200
WINDOW = (0.25, 0.9)
"""Which groups count, in the order in which they are done: no cluster that fills, and none that runs out."""
FRONT_LOAD = 0.6
"""Of proxies and ingresses, where there are enough of them."""


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        load: None where sessions follow each other at once.
        has_enough: proxies and ingresses, and not one of each.
    """

    router: str
    num_replicas: int
    load: float | None
    has_enough: bool

    def __str__(self) -> str:
        load = "full" if self.load is None else f"load {self.load:g}"
        return f"{self.num_replicas} engines, {load}, {self.front}, {self.router}"

    @property
    def front(self) -> str:
        return "enough ingresses" if self.has_enough else "one ingress"


@dataclass(frozen=True)
class Outcome:
    """What has come of it; of a second or of a group, in the window."""

    groups_per_s: float
    tokens_per_s: float
    p50_s: float
    p99_s: float
    hit_rate: float
    engines_busy: float
    ingress_busy: float
    proxy_busy: float
    num_ingresses: float
    num_proxies: float


UNITS = {
    "groups_per_s": "1/s", "tokens_per_s": "tokens/s", "p50_s": "s", "p99_s": "s", "hit_rate": "",
    "engines_busy": "", "ingress_busy": "", "proxy_busy": "", "num_ingresses": "", "num_proxies": "",
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """What is the same for all settings."""

    costs: Costs
    trace: Sequence[Request]
    max_kept_tokens: int
    seed: int

    def sessions(self) -> Sessions:
        return Sessions(self.trace, self.seed)


def main() -> None:
    options = _options()
    world = World(_costs(options), read_trace(options.trace), _kept_tokens(options), options.seed)
    report = Report(torch.device("cpu"), "float32")
    outcomes: dict[Setting, Outcome] = {}
    for setting in _settings(options.replicas):
        start_s = time.perf_counter()
        outcomes[setting] = simulate(setting, world)
        print(f"{setting}: {time.perf_counter() - start_s:.1f} s to simulate")
        _note(setting, outcomes[setting], report)
    _note_limits(world, options.replicas, report)
    report.write(options.output / "simulation.csv")
    if not options.no_plot:
        from simulation_plot import draw  # only here is matplotlib needed

        draw(outcomes, options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Many engines, simulated.")
    parser.add_argument("--trace", type=Path, default=TRACE, help="what came, as traces.py writes it")
    parser.add_argument("--fixed-s", type=float, help="instead of the measured one: of an engine's pass")
    parser.add_argument("--token-s", type=float, help="the same: of a token, whatever it looks at")
    parser.add_argument("--ingress-s", type=float, help="the same: of a request, whatever its length")
    parser.add_argument("--proxy-s", type=float, help="the same")
    parser.add_argument("--kept-tokens", type=int, help="the same: what an engine keeps of prompts")
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    return parser.parse_args()


def _settings(replicas: Sequence[int]) -> Iterator[Setting]:
    for num_replicas in replicas:
        for router in ROUTERS:
            yield Setting(router, num_replicas, load=None, has_enough=False)
            for load in (None, *LOADS):
                yield Setting(router, num_replicas, load, has_enough=True)


# --- costs ------------------------------------------------------------------------------------------


def _costs(options: argparse.Namespace) -> Costs:
    costs = measured_costs()
    if options.token_s is not None:
        token_s = options.token_s
        costs = replace(costs, fixed_s=0.0, prompt_token_s=token_s, own_token_s=token_s, pair_s=0.0)
    if options.ingress_s is not None:
        costs = replace(costs, ingress_prompt_token_s=0.0, ingress_own_token_s=0.0)
    given = {name: getattr(options, name) for name in ("fixed_s", "ingress_s", "proxy_s")}
    return replace(costs, **{name: value for name, value in given.items() if value is not None})


def _kept_tokens(options: argparse.Namespace) -> int:
    if options.kept_tokens is not None:
        return int(options.kept_tokens)
    return measured_kept_tokens()


# --- runs -------------------------------------------------------------------------------------------


def simulate(setting: Setting, world: World) -> Outcome:
    sessions, costs = world.sessions(), world.costs
    ideal_s = sessions.mean_ideal_s(costs)
    size = _size(setting, world, ideal_s / sessions.mean_steps())
    cluster = Cluster(size, costs, ROUTERS[setting.router])
    num_sessions = max(MIN_SESSIONS, SESSIONS_EACH * setting.num_replicas)
    if setting.load is None:
        run_closed(cluster, list(islice(sessions, num_sessions)), AT_ONCE * setting.num_replicas)
    else:
        run_open(cluster, sessions, setting.load * setting.num_replicas / ideal_s, num_sessions)
    return _outcome(cluster, size, costs)


def _size(setting: Setting, world: World, ideal_s: float) -> Size:
    """`ideal_s`: of a group. So engines that never wait take `num_replicas / ideal_s` groups a second."""
    size = Size(setting.num_replicas, max_kept_tokens=world.max_kept_tokens)
    if not setting.has_enough:
        return size
    rate = setting.num_replicas / ideal_s / FRONT_LOAD
    front_s = mean_front_s(world, setting.num_replicas)
    return replace(
        size, num_ingresses=math.ceil(rate * front_s), num_proxies=math.ceil(rate * world.costs.proxy_s)
    )


def mean_front_s(world: World, num_replicas: int) -> float:
    """Of the trace's groups."""
    groups = [Group(request.path, request.own_tokens) for request in world.trace]
    return statistics.fmean(world.costs.front_s(group, num_replicas) for group in groups)


def _outcome(cluster: Cluster, size: Size, costs: Costs) -> Outcome:
    first, last = (int(share * len(cluster.done)) for share in WINDOW)
    groups = cluster.done[first:last]
    duration_s = groups[-1].done_s - groups[0].done_s
    rate = len(groups) / duration_s
    latencies_s = [group.latency_s for group in groups]
    front_s = statistics.fmean(costs.front_s(group, size.num_replicas) for group in groups)
    return Outcome(
        groups_per_s=rate,
        tokens_per_s=sum(group.all_tokens for group in groups) / duration_s,
        p50_s=float(np.quantile(latencies_s, 0.5)),
        p99_s=float(np.quantile(latencies_s, 0.99)),
        hit_rate=sum(g.num_hit for g in groups) / sum(g.prompt_tokens for g in groups),
        engines_busy=rate * statistics.fmean(group.engine_s for group in groups) / size.num_replicas,
        ingress_busy=rate * front_s / size.num_ingresses,
        proxy_busy=rate * costs.proxy_s / size.num_proxies,
        num_ingresses=size.num_ingresses,
        num_proxies=size.num_proxies,
    )


def _note(setting: Setting, outcome: Outcome, report: Report) -> None:
    for name, unit in UNITS.items():
        report.note(setting, name, getattr(outcome, name), unit)


def _note_limits(world: World, replicas: Sequence[int], report: Report) -> None:
    """How many engines one process can feed, if they keep all that they can."""
    sessions, costs = world.sessions(), world.costs
    engine_s = sessions.mean_ideal_s(costs) / sessions.mean_steps()
    report.note("a group", "engine", engine_s, "s")
    report.note("a group", "proxy", costs.proxy_s, "s")
    report.note("a group", "proxy: engines that it can feed", engine_s / costs.proxy_s, "")
    for num_replicas in (replicas[0], replicas[-1]):
        front_s = mean_front_s(world, num_replicas)
        workload = f"a group, {num_replicas} engines"
        report.note(workload, "ingress", front_s, "s")
        report.note(workload, "ingress: engines that it can feed", engine_s / front_s, "")


if __name__ == "__main__":
    main()
