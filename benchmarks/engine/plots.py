"""Plots of cost growth. Only plots need matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from benchmarks.engine.growth import Point

# Without it, plots of the same numbers differ as files.
mpl.rcParams["svg.hashsalt"] = "shopr1"
SVG_METADATA = {"Date": None}
TICKS_OF_A_DECADE = (1, 2, 3, 5, 7)
PLAIN_NUMBERS = StrMethodFormatter("{x:g}")


def draw_by_completions(points: Sequence[Point], policy: str, folder: Path) -> None:
    shape = points[0].shape
    title = f"{shape.P} prompt tokens, {shape.R} rationale tokens each\n{policy}"
    sizes = [point.shape.G for point in points]
    _draw(points, sizes, "completions of the prompt", title, folder / "cost_by_completions.svg")


def draw_by_prompt(points: Sequence[Point], policy: str, folder: Path) -> None:
    shape = points[0].shape
    title = f"{shape.G} completions, {shape.R} rationale tokens each\n{policy}"
    sizes = [point.shape.P for point in points]
    _draw(points, sizes, "prompt tokens", title, folder / "cost_by_prompt.svg")


def _draw(points: Sequence[Point], sizes: Sequence[int], x_label: str, title: str, path: Path) -> None:
    """Two panels: times, and ratios of the batch to the engine."""
    figure = Figure(figsize=(7, 7), layout="constrained")
    times, ratios = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title, fontsize=11)
    _draw_times(times, sizes, points)
    _draw_ratios(ratios, sizes, points)
    ratios.set_xlabel(x_label)
    ratios.set_xticks(sizes)
    ratios.xaxis.set_major_formatter(PLAIN_NUMBERS)
    ratios.xaxis.set_minor_locator(NullLocator())
    figure.savefig(path, metadata=SVG_METADATA)
    print(f"wrote {path}")


def _draw_times(axes: Any, sizes: Sequence[int], points: Sequence[Point]) -> None:  # noqa: ANN401
    kept = [(size, point.keep_s) for size, point in zip(sizes, points, strict=True) if point.keep_s]
    axes.loglog(*zip(*kept, strict=True), "s-", color="tab:red", label="keep: a batch of whole sequences")
    axes.loglog(sizes, [point.engine_s for point in points], "o-", color="tab:blue", label="engine")
    _finish(axes, "time of one request in s")


def _draw_ratios(axes: Any, sizes: Sequence[int], points: Sequence[Point]) -> None:  # noqa: ANN401
    kept = [
        (size, point.keep_s / point.engine_s)
        for size, point in zip(sizes, points, strict=True)
        if point.keep_s
    ]
    ideal = [point.shape.ideal_ratio for point in points]
    axes.loglog(sizes, ideal, "--", color="gray", label="ideal: tokens, G(P+R) / (P+GR)")
    axes.loglog(*zip(*kept, strict=True), "o-", color="tab:blue", label="keep / engine, measured")
    _finish(axes, "times as long")


def _finish(axes: Any, y_label: str) -> None:  # noqa: ANN401
    axes.set_ylabel(y_label)
    axes.yaxis.set_major_locator(LogLocator(subs=TICKS_OF_A_DECADE))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PLAIN_NUMBERS)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
