"""The simulation as a picture. Needs matplotlib, which nothing else does."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from plots import PLAIN_NUMBERS, SVG_METADATA
from simulation import LOADS, Outcome, Setting

COLORS = {"affinity": "tab:blue", "affinity, missing twice": "tab:green", "round robin": "tab:red"}

Outcomes = Mapping[Setting, Outcome]


def draw(outcomes: Outcomes, folder: Path) -> None:
    """Throughput, what is full, hit rate and latency, by the number of engines."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (throughput, busy), (hits, latency) = figure.subplots(2, 2, sharex=True)
    _throughput(throughput, outcomes)
    _busy(busy, outcomes)
    _hits(hits, outcomes)
    _latency(latency, outcomes)
    figure.savefig(folder / "simulation.svg", metadata=SVG_METADATA)
    print(f"wrote {folder / 'simulation.svg'}")


def _throughput(axes: Any, outcomes: Outcomes) -> None:  # noqa: ANN401
    for router, color in COLORS.items():
        for has_enough, style in ((True, "o-"), (False, "o:")):
            label = f"{router}, {'enough ingresses' if has_enough else 'one ingress'}"
            sizes, values = _line(outcomes, router, None, lambda o: o.tokens_per_s, has_enough=has_enough)
            axes.loglog(sizes, values, style, color=color, label=label)
    _finish(axes, "tokens/s of what was asked, all full")


def _busy(axes: Any, outcomes: Outcomes) -> None:  # noqa: ANN401
    of: Mapping[str, Callable[[Outcome], float]] = {
        "engines": lambda o: o.engines_busy,
        "the ingress": lambda o: o.ingress_busy,
        "the proxy": lambda o: o.proxy_busy,
    }
    for (label, get), style in zip(of.items(), ("o-", "s--", "^:"), strict=True):
        axes.semilogx(*_line(outcomes, "affinity", None, get, has_enough=False), style, label=label)
    _finish(axes, "busy, one proxy, one ingress, affinity, all full")


def _hits(axes: Any, outcomes: Outcomes) -> None:  # noqa: ANN401
    for router, color in COLORS.items():
        for load, style in zip((*LOADS, None), ("s--", "^:", "o-"), strict=True):
            label = f"{router}, {'full' if load is None else f'load {load:g}'}"
            axes.semilogx(
                *_line(outcomes, router, load, lambda o: o.hit_rate), style, color=color, label=label
            )
    axes.set_ylim(0, 1)
    _finish(axes, "tokens of prompts that were kept, enough ingresses")


def _latency(axes: Any, outcomes: Outcomes) -> None:  # noqa: ANN401
    for router, color in COLORS.items():
        for load, style in zip(LOADS, ("s--", "^:"), strict=True):
            label = f"{router}, load {load:g}"
            axes.loglog(*_line(outcomes, router, load, lambda o: o.p99_s), style, color=color, label=label)
    _finish(axes, "p99 in s, enough ingresses")


def _line(
    outcomes: Outcomes,
    router: str,
    load: float | None,
    get: Callable[[Outcome], float],
    *,
    has_enough: bool = True,
) -> tuple[Sequence[int], Sequence[float]]:
    chosen = {
        setting.num_replicas: get(outcome)
        for setting, outcome in outcomes.items()
        if (setting.router, setting.load, setting.has_enough) == (router, load, has_enough)
    }
    return list(chosen), list(chosen.values())


def _finish(axes: Any, y_label: str) -> None:  # noqa: ANN401
    axes.set_xlabel("engines")
    axes.set_ylabel(y_label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
