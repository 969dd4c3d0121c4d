"""Alert rules, dashboard and their page agree with each other and with what the service exposes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from shopr1_service.http.state import State
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.settings import Settings
from tests.support.http import running

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text("utf-8")
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "shopr1.json"
ALL_PANELS: list[dict[str, Any]] = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
PANELS = [panel for panel in ALL_PANELS if panel["type"] != "row"]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

CLIENT_LIBRARY_METRICS = ("process_", "python_", "up")
_TOTAL = {"counter": "_total"}

each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])


def exposed() -> dict[str, str]:
    """Types of the service's own metrics by name, as Prometheus sees them."""
    families = State(Settings()).metrics.registry.collect()
    return {
        f.name + _TOTAL.get(f.type, ""): f.type
        for f in families
        if not f.name.startswith(CLIENT_LIBRARY_METRICS)
    }


def listed() -> dict[str, str]:
    """Types of the metrics in the tables of docs/metrics.md, by name."""
    return dict(re.findall(r"^\| `(shopr1_\w+)` \| (\w+) \|", PAGE, re.MULTILINE))


def named_in(text: str) -> set[str]:
    """Metrics in PromQL, without the suffixes of histograms."""
    names = re.findall(r"(?<![:\w])(?:shopr1|process)_\w+", re.sub(r'"[^"]*"', "", text))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def test_the_page_lists_exactly_the_exposed_metrics() -> None:
    assert listed() == exposed()


@pytest.mark.anyio
async def test_a_running_service_exposes_the_same_metrics() -> None:
    async with running(FakePolicy()) as client:
        text = (await client.get("/metrics")).text
    types = dict(re.findall(r"^# TYPE (shopr1_\w+) (\w+)$", text, re.MULTILINE))
    assert types == exposed()


@each_alert
def test_alerts_have_annotations_and_a_runbook(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    annotations = alert["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook"}
    assert annotations["runbook"] == f"docs/metrics.md#{alert['alert'].lower()}"
    assert f"\n### {alert['alert']}\n" in PAGE
    if "run:" in alert["expr"]:
        assert "$labels.run" in annotations["summary"]


def test_alerts_of_the_page_exist() -> None:
    described = set(re.findall(r"^### (\w+)$", PAGE, re.MULTILINE))
    assert described <= {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_metrics_of_the_rules_exist(rule: dict[str, Any]) -> None:
    recorded = set(re.findall(r"run:\w+:\w+", rule["expr"]))
    assert recorded <= {each.get("record") for each in RULES}
    assert named_in(rule["expr"]) <= exposed().keys()


def unit(panel: dict[str, Any]) -> str:
    """Unit of a panel's values. A heatmap has it on its axis because its cells are counts."""
    where = panel["options"]["yAxis"] if panel["type"] == "heatmap" else panel["fieldConfig"]["defaults"]
    return str(where["unit"])


@each_panel
def test_panels_query_documented_metrics(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        named = named_in(target["expr"])
        assert named
        own = {name for name in named if not name.startswith("process_")}
        assert own <= exposed().keys() & listed().keys()


@each_panel
def test_panels_describe_meaning_healthy_range_and_action(panel: dict[str, Any]) -> None:
    assert panel["title"].strip()
    assert re.fullmatch(r"\S.*\. Healthy: .+\. If .+\.", panel["description"])
    assert unit(panel)


@each_panel
def test_panels_use_the_selected_data_source(panel: dict[str, Any]) -> None:
    for each in (panel, *panel["targets"]):
        assert each["datasource"] == SOURCE


@each_panel
def test_panels_rows_and_alerts_in_descriptions_exist(panel: dict[str, Any]) -> None:
    titles = {each["title"] for each in ALL_PANELS} - {panel["title"]}
    assert set(re.findall(r'"([^"]+)"', panel["description"])) <= titles
    alerts = {alert["alert"] for alert in ALERTS}
    assert set(re.findall(r"alert (\w+)", panel["description"])) <= alerts


def test_panels_have_unique_ids_and_titles() -> None:
    for key in ("id", "title"):
        values = [panel[key] for panel in ALL_PANELS]
        assert len(set(values)) == len(values)
    assert all(panel["id"] > 0 for panel in ALL_PANELS)


def test_panels_fill_their_rows_and_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in ALL_PANELS:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        own = {(column, row) for column in range(x, x + width) for row in range(y, y + height)}
        assert not own & cells
        cells |= own
    assert len(cells) == 24 * (max(row for _, row in cells) + 1)


def test_the_dashboard_is_formatted_for_diffs() -> None:
    """Sorted keys, two spaces, and no value that depends on the exporting Grafana."""
    text = DASHBOARD.read_text("utf-8")
    dashboard = json.loads(text)
    assert text == json.dumps(dashboard, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert not {"id", "version", "__inputs", "__requires"} & dashboard.keys()
    assert dashboard["uid"] == "shopr1"


def test_links_of_the_page_exist() -> None:
    for file, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", PAGE):
        target = ROOT / "docs" / file if file else ROOT / "docs" / "metrics.md"
        assert target.exists(), file
        headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, anchor
