"""1 to 256 engines, fed with a recorded trace: throughput, waiting, what is kept, and what is full first.

Nothing is computed by a model here: what things take is read from costs.csv and front.csv, or given.
README.md has the assumptions. Run by `make bench-simulation`.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from report import Report
from simulated_cluster import Cluster, Size, paged_session, run_closed
from simulated_costs import measured_costs, measured_kept_tokens
from simulated_engine import Costs
from simulated_runs import ROUTERS, Front, Outcome, Setting, World, mean_front_s, simulate, size_of
from traces import TRACE, read_trace

FOLDER = Path(__file__).parent
REPLICAS = tuple(2**i for i in range(9))
LOADS = (0.4, 0.8)
"""Of what engines could do that keep all and never wait."""
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
    world = World(_costs(options), read_trace(options.trace), _kept_tokens(options), options.seed)
    report = Report(torch.device("cpu"), "float32")
    outcomes: dict[Setting, Outcome] = {}
    for setting in _settings(options.replicas):
        known = _known(setting, outcomes, world)
        outcomes[setting] = known or simulate(setting, world)
        if known is None:
            _note(setting, outcomes[setting], report)
    _note_check(world.costs, report)
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
            yield from (Setting(router, num_replicas, None, front) for front in Front)
            yield from (Setting(router, num_replicas, load, Front.BY_SESSION) for load in LOADS)


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


def _known(setting: Setting, outcomes: Mapping[Setting, Outcome], world: World) -> Outcome | None:
    """What is the same with one ingress, because more are not needed."""
    if setting.load is not None or size_of(setting, world).num_ingresses > 1:
        return None
    return outcomes.get(replace(setting, front=Front.ONE))


def _note(setting: Setting, outcome: Outcome, report: Report) -> None:
    for name, (quantity, unit) in ROWS.items():
        report.note(setting, quantity, getattr(outcome, name), unit)


def _note_check(costs: Costs, report: Report) -> None:
    """What cluster.py has two engines do, with the same names as in cluster.csv."""
    for num_at_once in (1, 3):
        workload = f"check: 8 steps, {num_at_once} at once"
        for name in ("affinity", "round robin"):
            cluster = Cluster(Size(2), costs, ROUTERS[name])
            run_closed(cluster, [paged_session(number, 8, 400, 30) for number in range(6)], num_at_once)
            num_tokens = sum(group.forwarded_tokens for group in cluster.done)
            report.note(workload, f"{name}: forwarded tokens", num_tokens, "tokens")
            report.note(workload, f"{name}: time", cluster.clock.now_s, "s")


def _note_limits(world: World, replicas: Sequence[int], report: Report) -> None:
    """How many engines one process can feed, if they keep all that they can."""
    costs, engine_s = world.costs, world.ideal_group_s
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
