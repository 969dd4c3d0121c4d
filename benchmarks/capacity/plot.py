"""Plot of the simulation. Only plots need matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.capacity.runs import LOADS, Ingresses, Result, Setting
from benchmarks.engine.plots import PLAIN_NUMBERS, SVG_METADATA

COLORS = {"affinity": "tab:blue", "affinity, missing twice": "tab:green", "round robin": "tab:red"}
STYLES = {Ingresses.ONE: "o:", Ingresses.IN_TURN: "^--", Ingresses.BY_SESSION: "s-"}

Results = Mapping[Setting, Result]


def draw(results: Results, folder: Path) -> None:
    """Four panels by the number of engines: throughput, utilisation, hit rate and latency."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    (throughput, busy), (hits, latency) = figure.subplots(2, 2, sharex=True)
    _by_ingresses(throughput, results, lambda result: result.tokens_per_s)
    throughput.set_yscale("log")
    _finish(throughput, "requested tokens/s, full load")
    _busy(busy, results)
    _by_ingresses(hits, results, lambda result: result.hit_rate)
    hits.set_ylim(0, 1)
    _finish(hits, "cache hit rate, full load")
    _latency(latency, results)
    figure.savefig(folder / "simulation.svg", metadata=SVG_METADATA)
    print(f"wrote {folder / 'simulation.svg'}")


def _by_ingresses(axes: Any, results: Results, get: Callable[[Result], float]) -> None:  # noqa: ANN401
    for router, color in COLORS.items():
        for ingresses, style in STYLES.items():
            axes.plot(
                *_line(results, router, None, ingresses, get),
                style,
                color=color,
                label=f"{router}, {ingresses}",
            )


def _busy(axes: Any, results: Results) -> None:  # noqa: ANN401
    of: Mapping[str, Callable[[Result], float]] = {
        "engines": lambda result: result.engines_busy,
        "the ingress": lambda result: result.ingress_busy,
        "the proxy": lambda result: result.proxy_busy,
    }
    for (label, get), style in zip(of.items(), ("o-", "s--", "^:"), strict=True):
        axes.plot(*_line(results, "affinity", None, Ingresses.ONE, get), style, label=label)
    _finish(axes, "share of time busy: one ingress, affinity, full load")


def _latency(axes: Any, results: Results) -> None:  # noqa: ANN401
    for router, color in COLORS.items():
        for load, style in zip(LOADS, ("s-", "^:"), strict=True):
            line = _line(results, router, load, Ingresses.BY_SESSION, lambda result: result.p99_s)
            axes.plot(*line, style, color=color, label=f"{router}, load {load:g}")
    axes.set_yscale("log")
    _finish(axes, "p99 in s, ingresses by session")


def _line(
    results: Results, router: str, load: float | None, ingresses: Ingresses, get: Callable[[Result], float]
) -> tuple[Sequence[int], Sequence[float]]:
    chosen = {
        setting.num_replicas: get(result)
        for setting, result in results.items()
        if (setting.router, setting.load, setting.ingresses) == (router, load, ingresses)
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
