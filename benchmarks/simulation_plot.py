"""The simulation as a picture. Needs matplotlib, which nothing else does."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from plots import PLAIN_NUMBERS, SVG_METADATA
from simulated_runs import Front, Outcome, Setting
from simulation import LOADS

COLORS = {"affinity": "tab:blue", "affinity, missing twice": "tab:green", "round robin": "tab:red"}
STYLES = {Front.ONE: "o:", Front.IN_TURN: "^--", Front.BY_SESSION: "s-"}

Outcomes = Mapping[Setting, Outcome]


def draw(outcomes: Outcomes, folder: Path) -> None:
    """Throughput, what is full, hit rate and latency, by the number of engines."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    (throughput, busy), (hits, latency) = figure.subplots(2, 2, sharex=True)
    _by_front(throughput, outcomes, lambda outcome: outcome.tokens_per_s)
    throughput.set_yscale("log")
    _finish(throughput, "tokens/s that were asked, everything full")
    _busy(busy, outcomes)
    _by_front(hits, outcomes, lambda outcome: outcome.hit_rate)
    hits.set_ylim(0, 1)
    _finish(hits, "share of prompts that was kept, everything full")
    _latency(latency, outcomes)
    figure.savefig(folder / "simulation.svg", metadata=SVG_METADATA)
    print(f"wrote {folder / 'simulation.svg'}")


def _by_front(axes: Any, outcomes: Outcomes, get: Callable[[Outcome], float]) -> None:  # noqa: ANN401
    for router, color in COLORS.items():
        for front, style in STYLES.items():
            axes.plot(
                *_line(outcomes, router, None, front, get), style, color=color, label=f"{router}, {front}"
            )


def _busy(axes: Any, outcomes: Outcomes) -> None:  # noqa: ANN401
    of: Mapping[str, Callable[[Outcome], float]] = {
        "engines": lambda outcome: outcome.engines_busy,
        "the ingress": lambda outcome: outcome.ingress_busy,
        "the proxy": lambda outcome: outcome.proxy_busy,
    }
    for (label, get), style in zip(of.items(), ("o-", "s--", "^:"), strict=True):
        axes.plot(*_line(outcomes, "affinity", None, Front.ONE, get), style, label=label)
    _finish(axes, "share of time busy: one ingress, affinity, full")


def _latency(axes: Any, outcomes: Outcomes) -> None:  # noqa: ANN401
    for router, color in COLORS.items():
        for load, style in zip(LOADS, ("s-", "^:"), strict=True):
            line = _line(outcomes, router, load, Front.BY_SESSION, lambda outcome: outcome.p99_s)
            axes.plot(*line, style, color=color, label=f"{router}, load {load:g}")
    axes.set_yscale("log")
    _finish(axes, "p99 in s, ingresses by session")


def _line(
    outcomes: Outcomes, router: str, load: float | None, front: Front, get: Callable[[Outcome], float]
) -> tuple[Sequence[int], Sequence[float]]:
    chosen = {
        setting.num_replicas: get(outcome)
        for setting, outcome in outcomes.items()
        if (setting.router, setting.load, setting.front) == (router, load, front)
    }
    return list(chosen), list(chosen.values())


def _finish(axes: Any, y_label: str) -> None:  # noqa: ANN401
    axes.set_xscale("log", base=2)
    axes.set_xlabel("engines")
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7)
