"""What the dashboard is made of: kinds of panels, and PromQL."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, DataTransformerConfig, Panel
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef("prometheus", "${datasource}")
HEIGHT, THIRD, QUARTER, HALF = 8, 8, 6, 12  # the grid is 24 wide

RUN = 'run=~"$run",recipe=~"$recipe",instance=~"$instance"'
INSTANCE = 'instance=~"$instance"'
SCORING = f'{INSTANCE},route=~"/score|/dialects/.+"'
PROCESS = "{{instance}} {{engine}}"
"""Names a line of one process. Without Ray Serve there is no engine's name."""

Panels = Sequence[Builder[Panel]]


class Query(NamedTuple):
    """PromQL, and what its lines are called."""

    expr: str
    legend: str


_Panel = TypeVar("_Panel", timeseries.Panel, heatmap.Panel, table.Panel, stat.Panel)


def rate(metric: str, labels: str) -> str:
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def total(metric: str, by: str, labels: str = RUN) -> str:
    """Of counters, per second."""
    return f"sum by ({by}) ({rate(metric, labels)})"


def share(metric: str, by: str, labels: str = RUN) -> str:
    """Of all scored rollouts."""
    return f"{total(metric, by, labels)} / scalar(sum({rate('shopr1_actions_total', RUN)}))"


def mean(metric: str, by: str, labels: str = RUN) -> str:
    return f"{total(f'{metric}_sum', by, labels)} / {total(f'{metric}_count', by, labels)}"


def quantile(q: float, metric: str, by: str, labels: str = RUN) -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) ({rate(f'{metric}_bucket', labels)}))"


def quantiles(metric: str, by: str, name: str, labels: str = RUN) -> list[Query]:
    return [Query(quantile(q, metric, by, labels), f"p{100 * q:g} {name}") for q in (0.1, 0.5, 0.9)]


def common_parts(panel: _Panel, title: str, description: str, width: int) -> _Panel:
    return panel.title(title).description(description).datasource(SOURCE).span(width).height(HEIGHT)


def graph(
    title: str, description: str, *queries: Query, unit: str = units.Short, width: int = THIRD
) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True)
    legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = common_parts(timeseries.Panel(), title, description, width).legend(legend).unit(unit)
    panel.fill_opacity(5).axis_soft_min(0)
    for ref_id, query in zip("ABCDEF", queries, strict=False):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(ref_id)
        panel.with_target(target.datasource(SOURCE).range())
    return panel


def heat(
    title: str, description: str, metric: str, unit: str = units.Short, width: int = THIRD
) -> heatmap.Panel:
    expr = f"sum by (le) (increase({metric}_bucket{{{RUN}}}[$__rate_interval]))"
    target = prometheus.Dataquery().expr(expr).legend_format("{{le}}").ref_id("A").datasource(SOURCE)
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(32)
    panel = common_parts(heatmap.Panel(), title, description, width)
    panel.y_axis(heatmap.YAxisConfig().unit(unit)).color(color)
    return panel.calculate(False).with_target(target.format(PromQueryFormat.HEATMAP).range())


def matrix(
    title: str, description: str, expr: str, rows: str, columns: str, width: int = THIRD
) -> table.Panel:
    target = prometheus.Dataquery().expr(expr).ref_id("A").datasource(SOURCE).instant()
    options = {"rowField": rows, "columnField": columns, "valueField": "Value", "emptyValue": "zero"}
    panel = common_parts(table.Panel(), title, description, width).decimals(0)
    panel.with_target(target.format(PromQueryFormat.TABLE))
    return panel.with_transformation(DataTransformerConfig(id_val="groupingToMatrix", options=options))


def number(title: str, description: str, query: Query, unit: str = units.Short) -> stat.Panel:
    target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id("A").instant()
    panel = common_parts(stat.Panel(), title, description, QUARTER).height(4).unit(unit)
    return panel.with_target(target.datasource(SOURCE))
