"""Simulation of 1 to 256 engines on a recorded trace: throughput, latency, cache hits, bottleneck.

No model runs here: costs come from costs.csv and ingress_cost.csv, or from options. README.md states the
assumptions. Run by `make bench-simulation`.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.capacity.cluster import Cluster, Size, paged_session, run_closed
from benchmarks.capacity.costs import measured_cache_tokens, measured_costs
from benchmarks.capacity.engine import Costs
from benchmarks.capacity.runs import (
    LOADS,
    ROUTERS,
    Ingresses,
    Result,
    Setting,
    World,
    mean_ingress_s,
    simulate,
    size_of,
)
from benchmarks.capacity.trace import TRACE, read_trace
from benchmarks.report import Report

FOLDER = Path(__file__).parent
REPLICAS = tuple(2**i for i in range(9))
ROWS = {
    "groups_per_s": ("groups", "1/s"),
    "tokens_per_s": ("tokens", "1/s"),
    "p50_s": ("p50", "s"),
    "p99_s": ("p99", "s"),
    "hit_rate": ("cache hit rate", ""),
    "engines_busy": ("engines busy", ""),
    "ingress_busy": ("ingresses busy", ""),
    "proxy_busy": ("proxies busy", ""),
    "num_ingresses": ("ingresses", ""),
}


def main() -> None:
    options = _options()
    world = World(_costs(options), read_trace(options.trace), _cache_tokens(options), options.seed)
    report = Report(torch.device("cpu"), "float32")
    results: dict[Setting, Result] = {}
    for setting in _settings(options.replicas):
        equal = _equal_result(setting, results, world)
        results[setting] = equal or simulate(setting, world)
        if equal is None:
            _add(setting, results[setting], report)
    _add_check(world.costs, report)
    _add_limits(world, options.replicas, report)
    report.write(options.output / "simulation.csv")
    if not options.no_plot:
        from benchmarks.capacity.plot import draw  # only plots need matplotlib

        draw(results, options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Many engines, simulated.")
    parser.add_argument("--trace", type=Path, default=TRACE, help="a trace, as written by record_trace")
    parser.add_argument("--fixed-s", type=float, help="cost of a pass, instead of the measured one")
    parser.add_argument("--token-s", type=float, help="cost of a token, instead of the measured ones")
    parser.add_argument("--ingress-s", type=float, help="CPU time of the ingress per request, of any length")
    parser.add_argument("--proxy-s", type=float, help="CPU time of the proxy per request")
    parser.add_argument("--cache-tokens", type=int, help="capacity of an engine's prefix cache")
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    return parser.parse_args()


def _settings(replicas: Sequence[int]) -> Iterator[Setting]:
    for num_replicas in replicas:
        for router in ROUTERS:
            yield from (Setting(router, num_replicas, None, ingresses) for ingresses in Ingresses)
            yield from (Setting(router, num_replicas, load, Ingresses.BY_SESSION) for load in LOADS)


# --- costs ------------------------------------------------------------------------------------------


def _costs(options: argparse.Namespace) -> Costs:
    costs = measured_costs()
    if options.token_s is not None:
        token_s = options.token_s
        costs = replace(costs, fixed_s=0.0, prompt_token_s=token_s, completion_token_s=token_s, pair_s=0.0)
    if options.ingress_s is not None:
        costs = replace(costs, ingress_prompt_token_s=0.0, ingress_completion_token_s=0.0)
    given = {name: getattr(options, name) for name in ("fixed_s", "ingress_s", "proxy_s")}
    return replace(costs, **{name: value for name, value in given.items() if value is not None})


def _cache_tokens(options: argparse.Namespace) -> int:
    if options.cache_tokens is not None:
        return int(options.cache_tokens)
    return measured_cache_tokens()


def _equal_result(setting: Setting, results: Mapping[Setting, Result], world: World) -> Result | None:
    """Result with one ingress, if the setting needs no more than one."""
    if setting.load is not None or size_of(setting, world).num_ingresses > 1:
        return None
    return results.get(replace(setting, ingresses=Ingresses.ONE))


def _add(setting: Setting, result: Result, report: Report) -> None:
    for name, (quantity, unit) in ROWS.items():
        report.add(setting, quantity, getattr(result, name), unit)


def _add_check(costs: Costs, report: Report) -> None:
    """The sessions of ray_serve.py on two engines, with the names of ray_serve.csv."""
    for num_at_once in (1, 3):
        workload = f"check: 8 steps, {num_at_once} at once"
        for name in ("affinity", "round robin"):
            cluster = Cluster(Size(2), costs, ROUTERS[name])
            run_closed(cluster, [paged_session(number, 8, 400, 30) for number in range(6)], num_at_once)
            num_tokens = sum(group.forwarded_tokens for group in cluster.done)
            report.add(workload, f"{name}: forwarded tokens", num_tokens, "tokens")
            report.add(workload, f"{name}: time", cluster.clock.now_s, "s")


def _add_limits(world: World, replicas: Sequence[int], report: Report) -> None:
    """Number of engines that one proxy or ingress can feed, with unlimited prefix caches."""
    costs, engine_s = world.costs, world.ideal_group_s
    report.add("a group", "engine", engine_s, "s")
    report.add("a group", "proxy", costs.proxy_s, "s")
    report.add("a group", "proxy: engines that it can feed", engine_s / costs.proxy_s, "")
    for num_replicas in (replicas[0], replicas[-1]):
        ingress_s = mean_ingress_s(world, num_replicas)
        workload = f"a group, {num_replicas} engines"
        report.add(workload, "ingress", ingress_s, "s")
        report.add(workload, "ingress: engines that it can feed", engine_s / ingress_s, "")


if __name__ == "__main__":
    main()
