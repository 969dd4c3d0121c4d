"""Writes Grafana's dashboard of the service to standard output; `make dashboard` keeps it.

Each panel says in its description what sick looks like. Queries know the service's own metrics only, and
neither recording rules nor exporters.
"""

import json
import sys

import engines_row
import service_row
import training_row
from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from panels import SOURCE


def variable(name: str, metric: str) -> dashboard.QueryVariable:
    """A filter by a label; `All` also means series where it is empty."""
    builder = dashboard.QueryVariable(name).label(name).datasource(SOURCE).multi(True).include_all(True)
    builder.query({"query": f"label_values({metric}, {name})", "refId": name}).all_value(".*")
    builder.current(VariableOption(selected=True, text=["All"], value=["$__all"]))
    return builder.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)


def alerts() -> dashboard.AnnotationQuery:
    """Marks where an alert of Prometheus fires."""
    builder = dashboard.AnnotationQuery().name("Alerts").datasource(SOURCE).enable(True).hide(False)
    return builder.icon_color("red").expr('ALERTS{alertstate="firing",job="shopr1"}')


def build() -> dashboard.Dashboard:
    source = dashboard.DatasourceVariable("datasource").label("data source").type("prometheus")
    source.current(VariableOption(selected=True, text="Prometheus", value="prometheus"))
    board = dashboard.Dashboard("Shop-R1 reward service").uid("shopr1").tags(["shopr1"]).readonly()
    board.time("now-6h", "now").refresh("30s").timezone("browser").tooltip(DashboardCursorSync.CROSSHAIR)
    board.with_variable(source)
    board.with_variable(variable("run", "shopr1_rollouts_total"))
    board.with_variable(variable("recipe", "shopr1_rollouts_total"))
    board.with_variable(variable("instance", "shopr1_build_info")).annotation(alerts())
    rows = {"Training": training_row, "Service": service_row, "Engines": engines_row}
    for title, row in rows.items():
        board.with_row(dashboard.Row(title))
        for panel in row.panels():
            board.with_panel(panel)
    return board


def main() -> None:
    text = json.dumps(build().build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False)
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
