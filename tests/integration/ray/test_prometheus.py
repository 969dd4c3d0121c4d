"""A Prometheus with the shipped configuration, rules and dashboard scrapes the service on Ray."""

import json
import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from tests.integration.ray.conftest import KEYS, NUM_REPLICAS, START_S, client_of, replica_pids
from tests.support.http import answer, group
from tests.support.prometheus import ROOT, Prometheus, prometheus, promtool, until

NUM_BODIES = 12
_NORM = safetensors.torch.save({"model.norm.weight": torch.ones(576)})


@pytest.fixture(scope="module")
def running(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has seen both engines score, before an update and after it."""
    directory = tmp_path_factory.mktemp("prometheus")
    with prometheus(directory, cluster.removeprefix("http://"), api_key=KEYS["metrics"]) as running:
        score_all(cluster, "before")
        wait_for(running, "sum(shopr1_rollouts_total)", NUM_BODIES)
        with client_of(cluster, "admin") as client:
            params = {"version": "new", "partial": "true"}
            client.put("/policy/weights", params=params, content=_NORM).raise_for_status()
        score_all(cluster, "after")
        wait_for(running, "sum(shopr1_rollouts_total)", 2 * NUM_BODIES)
        yield running


def score_all(url: str, name: str) -> None:
    """Enough requests at a time for both engines."""

    def score(client: httpx.Client, number: int) -> None:
        body = {"groups": [group(answer(), prompt=f"{name} {number} " * 30)]}
        client.post("/score", json=body).raise_for_status()

    with client_of(url) as client, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: score(client, number), range(NUM_BODIES)))


def wait_for(running: Prometheus, expr: str, *values: float) -> None:
    until(lambda: sorted(running.values(expr)) == sorted(values) or None, expr, START_S)


def engines_row() -> list[Any]:
    file = ROOT / "docker" / "grafana" / "dashboards" / "shopr1.json"
    panels: list[Any] = json.loads(file.read_text("utf-8"))["panels"]
    titles = [panel["title"] for panel in panels]
    return panels[titles.index("Engines") + 1 :][:6]


def test_metrics_follow_the_naming_rules_of_prometheus(cluster: str) -> None:
    with client_of(cluster, "metrics") as client:
        text = client.get("/metrics").raise_for_status().text
    assert promtool("check", "metrics", given=text) == ""


def test_one_target_has_the_metrics_of_all_engines(running: Prometheus) -> None:
    wait_for(running, "up", 1)
    wait_for(running, 'count by (version) (shopr1_policy_info{version="new"})', NUM_REPLICAS)
    wait_for(running, "max by (engine) (shopr1_policy_number)", *[1.0] * NUM_REPLICAS)
    wait_for(running, "count(count by (version) (shopr1_policy_info))", 1)
    wait_for(running, "shopr1_policy_updates_total > 0", 1)  # once, not once for each engine


@pytest.mark.parametrize("panel", engines_row(), ids=lambda panel: panel["title"])
def test_the_dashboard_shows_each_engine(running: Prometheus, panel: dict[str, Any]) -> None:
    [target] = panel["targets"]
    expr = target["expr"].replace("$__rate_interval", "10m").replace("$instance", ".*")
    num_lines = {"Engines by version": 1, "Host memory of each process": NUM_REPLICAS + 1}
    # A scrape that takes longer than a second fails, and its samples are missing until the next one.
    wait_for(running, f"count({expr})", num_lines.get(panel["title"], NUM_REPLICAS))
    until(lambda: all(map(math.isfinite, running.values(expr))) or None, expr)


def test_rules_are_healthy_and_nothing_fires(running: Prometheus) -> None:
    def evaluated() -> list[Any] | None:
        rules = [rule for each in running.get("rules")["groups"] for rule in each["rules"]]
        return None if any(rule["health"] == "unknown" for rule in rules) else rules

    rules = until(evaluated, "all rules are evaluated")
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}
    assert [alert for alert in running.get("alerts")["alerts"] if alert["state"] == "firing"] == []


def test_a_replaced_engine_has_the_current_version(running: Prometheus) -> None:
    """It is never seen with the version that it has started from."""
    [since_s] = running.values("vector(time())")
    [victim, *_] = replica_pids()
    os.kill(victim, signal.SIGKILL)
    everyone = "count(count_over_time(shopr1_policy_number[10m]))"
    wait_for(running, everyone, NUM_REPLICAS + 1)
    wait_for(running, "count(shopr1_policy_number == 1)", NUM_REPLICAS)
    [now_s] = running.values("vector(time())")
    assert running.values(f"min(min_over_time(shopr1_policy_number[{now_s - since_s:.0f}s]))") == [1]
