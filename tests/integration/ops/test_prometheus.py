"""A real Prometheus scrapes a live service with the shipped configuration, rules and dashboard."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import safetensors.torch

from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from shopr1_service.updates.updatable_engine import UpdatableEngine
from tests.support.http import CLICK, SEARCH, TERMINATE, WAIT_S, answer, group, serving
from tests.support.models import policy_of, tiny_model
from tests.support.prometheus import (
    CONFIG,
    ROOT,
    RULES,
    RULES_TEST,
    Prometheus,
    prometheus,
    promtool,
    until,
)
from tests.support.updating import NORM

DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "shopr1.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

SCORE_KEY, METRICS_KEY, ADMIN_KEY = "a-key-for-scoring-0", "a-key-for-metrics-0", "a-key-for-admins-0"
RUNS = ("grpo-1", "grpo-2")
NUM_BURSTS = 2

LONG = "so much to read " * 400
"""Longer than the policy's limit."""
OTHER_CLICK = {"type": "click", "name": "x"}


WEIGHTS = safetensors.torch.save({NORM: tiny_model().state_dict()[NORM]})


# --- requests of the trainers -----------------------------------------------------------------------


def groups(prompt: str) -> list[dict[str, Any]]:
    """10 rollouts: every action type, 2 invalid, 1 unknown, 1 too long to be scored."""
    other_search = {**SEARCH, "text": "coffee"}
    clicks = (answer(CLICK), answer(OTHER_CLICK), answer(TERMINATE), answer({"type": "swipe"}), "{")
    return [
        group(*clicks, truth=CLICK, prompt=prompt),
        group(answer(TERMINATE), "", truth=TERMINATE, prompt=prompt),
        group(answer(SEARCH), answer(other_search), truth=SEARCH, prompt=prompt),
        group(answer(TERMINATE), truth=TERMINATE, prompt=prompt + LONG),
    ]


def burst(url: str, number: int, *, has_fallback: bool = True) -> dict[str, list[Any]]:
    """Rewards of the runs. Also sends a request twice, and perhaps one that gets a fallback reward."""
    headers = {"Authorization": f"Bearer {SCORE_KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=WAIT_S) as client:

        def send(run: str, path: str, body: object, **more: str) -> Any:
            response = client.post(path, json=body, headers={"X-Run-ID": run, **more})
            assert response.is_success, response.text
            return response.json()

        rewards = {}
        for run in RUNS:
            scored = send(run, "/score", {"groups": groups(f"{run} {number}: ")})
            rewards[run] = [reward for each in scored["groups"] for reward in each["rewards"]]
        for _ in range(2):
            key = {"Idempotency-Key": f"twice-{number}"}
            send("twice", "/score", {"groups": [group(answer(), prompt=f"twice {number}")]}, **key)
        prompt = f"{number} {LONG}"
        asked = {"query": [prompt + answer()], "prompts": [prompt], "labels": [TERMINATE]}
        if has_fallback:
            send("fallback", "/dialects/openrlhf/get_reward", asked)
    return rewards


NUM_ROLLOUTS = 10 * len(RUNS) + 2


@dataclass(frozen=True)
class Scene:
    """A used service, and the Prometheus server that scraped it."""

    service_url: str
    prometheus: Prometheus
    rewards: dict[str, list[Any]]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    keys = {"api_keys": f"score:{SCORE_KEY},metrics:{METRICS_KEY},admin:{ADMIN_KEY}"}
    settings = Settings.model_validate({**keys, "openrlhf_unscorable": 0.5})
    directory = tmp_path_factory.mktemp("prometheus")
    with (
        serving(create_app(settings, UpdatableEngine.opener(lambda: policy_of(tiny_model())))) as url,
        prometheus(directory, url.removeprefix("http://"), api_key=METRICS_KEY) as running,
    ):
        until(lambda: httpx.get(f"{url}/health/ready").is_success or None, "the service is ready")
        rewards: dict[str, list[Any]] = {run: [] for run in RUNS}
        for number in range(NUM_BURSTS):  # with a scrape after each: rates need two
            _update(url, f"{number}")
            for run, of_run in burst(url, number).items():
                rewards[run] += of_run
            _until_scraped(running, NUM_ROLLOUTS * (number + 1))
        yield Scene(url, running, rewards)


def _update(url: str, version: str) -> None:
    """Update with equal weights, so that rewards before and after are comparable."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    params = {"version": version, "partial": "true"}
    answered = httpx.put(f"{url}/policy/weights", params=params, content=WEIGHTS, headers=headers)
    assert answered.is_success, answered.text


def _until_scraped(running: Prometheus, num_rollouts: int) -> None:
    def seen() -> bool | None:
        return running.values("sum(shopr1_rollouts_total)") == [num_rollouts] or None

    until(seen, f"{num_rollouts} rollouts are scraped")


# --- the files --------------------------------------------------------------------------------------


def test_the_rules_are_valid() -> None:
    promtool("check", "rules", RULES)


def test_the_shipped_configuration_is_valid() -> None:
    promtool("check", "config", "--syntax-only", CONFIG)


@pytest.mark.timeout(900)  # hours of samples, with rules over six hours
def test_alerts_fire_on_faults_but_not_on_healthy_or_idle_services() -> None:
    promtool("test", "rules", RULES_TEST)
    tested = set(re.findall(r'alertname="(\w+)"', RULES_TEST.read_text("utf-8")))
    assert tested == set(re.findall(r"alert: (\w+)", RULES.read_text("utf-8")))


# --- the service ------------------------------------------------------------------------------------


def test_metric_names_follow_prometheus_conventions(scene: Scene) -> None:
    headers = {"Authorization": f"Bearer {METRICS_KEY}"}
    text = httpx.get(f"{scene.service_url}/metrics", headers=headers).text
    assert promtool("check", "metrics", given=text) == ""


def test_metrics_need_a_key(scene: Scene) -> None:
    assert httpx.get(f"{scene.service_url}/metrics").status_code == 401


def test_the_service_is_up(scene: Scene) -> None:
    [target] = scene.prometheus.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert scene.prometheus.values('up{job="shopr1"}') == [1]


# Increments of each run by one burst, see `groups`.
PER_BURST = {
    'rollouts_total{status="scored"': 9,
    'rollouts_total{status="unscorable",reason="sequence_too_long"': 1,
    'rollouts_total{status="unscorable",reason="out_of_memory"': 0,
    'reward_count{action_type="click"': 5,
    'reward_count{action_type="terminate"': 2,
    'reward_count{action_type="type_and_submit"': 2,
    'reward_bucket{action_type="click",le="0.0"': 1,
    'reward_bucket{action_type="click",le="0.75"': 3,
    'reward_bucket{action_type="click",le="1.5"': 4,
    'reward_bucket{action_type="click",le="1002.0"': 5,
    'actions_total{true_type="click",predicted_type="click"': 2,
    'actions_total{true_type="click",predicted_type="terminate"': 1,
    'actions_total{true_type="click",predicted_type="type_and_submit"': 0,
    'actions_total{true_type="click",predicted_type="unknown"': 1,
    'actions_total{true_type="click",predicted_type="invalid"': 1,
    'actions_total{true_type="terminate",predicted_type="terminate"': 1,
    'actions_total{true_type="terminate",predicted_type="invalid"': 1,
    'actions_total{true_type="type_and_submit",predicted_type="type_and_submit"': 2,
    'exact_matches_total{action_type="click"': 1,
    'exact_matches_total{action_type="terminate"': 1,
    'exact_matches_total{action_type="type_and_submit"': 1,
    'format_errors_total{error="invalid_json"': 1,
    'format_errors_total{error="empty"': 1,
    'reward_component_sum{component="format",action_type="click"': 4 * 0.5,
    'reward_component_sum{component="action_type",action_type="click"': 2 * 0.3,
    'reward_component_sum{component="attribute",action_type="click"': 2 * 0.2,
    'reward_component_sum{component="value",action_type="click"': 1000,
    'reward_component_sum{component="format",action_type="terminate"': 0.5,
    'reward_component_sum{component="attribute",action_type="type_and_submit"': 2 * 0.2,
    'reward_component_sum{component="value",action_type="type_and_submit"': 2 * 0.1 + 1000,
    'self_certainty_nats_count{action_type="click"': 4,
    'self_certainty_nats_count{action_type="terminate"': 1,
    "rationale_tokens_count{": 7,
    "rationale_repetition_ratio_count{": 7,
}


@pytest.mark.parametrize("series", PER_BURST)
def test_scraped_values_equal_those_computed_by_hand(scene: Scene, series: str) -> None:
    for run in RUNS:
        separator = "" if series.endswith("{") else ","
        values = scene.prometheus.values(f'shopr1_{series}{separator}run="{run}",recipe="shop_r1"}}')
        assert values == [pytest.approx(PER_BURST[series] * NUM_BURSTS)]


def test_scraped_sums_equal_the_returned_rewards(scene: Scene) -> None:
    for run, rewards in scene.rewards.items():
        scored = [reward for reward in rewards if reward["status"] == "scored"]
        measured = [r["details"] for r in scored if r["details"]["self_certainty_nats"] is not None]
        expected = {
            "reward": sum(reward["reward"] for reward in scored),
            "self_certainty_nats": sum(details["self_certainty_nats"] for details in measured),
            "rationale_tokens": sum(details["num_rationale_tokens"] for details in measured),
        }
        sums = {name: scene.prometheus.values(f'sum(shopr1_{name}_sum{{run="{run}"}})') for name in expected}
        assert sums == {name: [pytest.approx(value)] for name, value in expected.items()}


# --- rules and dashboard ----------------------------------------------------------------------------


def test_rules_are_loaded_and_healthy(scene: Scene) -> None:
    def evaluated() -> list[Any] | None:
        rules = [rule for each in scene.prometheus.get("rules")["groups"] for rule in each["rules"]]
        return None if any(rule["health"] == "unknown" for rule in rules) else rules

    rules = until(evaluated, "all rules are evaluated")
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}
    assert len(rules) == len(re.findall(r"- (?:alert|record):", RULES.read_text("utf-8")))


def test_the_only_alert_is_the_fallback_reward(scene: Scene) -> None:
    def firing() -> list[Any] | None:
        alerts = scene.prometheus.get("alerts")["alerts"]
        return [alert["labels"] for alert in alerts if alert["state"] == "firing"] or None

    [labels] = until(firing, "an alert fires")
    assert (labels["alertname"], labels["dialect"]) == ("FallbackRewards", "openrlhf")
    assert labels["reason"] == "sequence_too_long"


def substituted(expr: str, run: str) -> str:
    values = {"$__rate_interval": "1m", "$__range": "1h", "$run": run, "$recipe": ".*", "$instance": ".*"}
    for name, value in values.items():
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_query_of_the_dashboard_has_a_result(scene: Scene, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        for run in (".*", "grpo-1"):
            values = scene.prometheus.values(substituted(target["expr"], run))
            assert any(math.isfinite(value) for value in values), target["expr"]


def test_the_dashboards_variables_have_values(scene: Scene) -> None:
    names = {}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            [(metric, label)] = re.findall(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            names[label] = set(scene.prometheus.get(f"label/{label}/values", **{"match[]": metric}))
    assert names["run"] >= set(RUNS)
    assert names["recipe"] == {"shop_r1"}
    assert len(names["instance"]) == 1
