"""Numbers that engines report: what Prometheus sees, and how many engines Ray starts."""

import pickle
from dataclasses import dataclass, field

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shopr1_service.cluster.engine_metrics import QUEUED_TOKENS, QueuedTokens, Scrape, labelled
from shopr1_service.monitoring.metrics import ENGINE_FAMILIES, Metrics, Phase


def test_each_sample_has_the_label_of_its_engine() -> None:
    front, first, second = Metrics(), Metrics(max_queue_tokens=9), Metrics(max_queue_tokens=9)
    first.record_queue(5)
    second.record_queue(7)
    second.record_phase(Phase.ENGINE, 0.5)
    front.record_phase(Phase.PREPARE, 0.1)
    front.record_request("GET", "/info", 200, 0.1)
    sent = pickle.loads(pickle.dumps([Scrape.of("a", first), Scrape.of("b", second)]))
    text = front.render(labelled(sent)).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert text.count("# TYPE shopr1_queue_tokens ") == 1
    queued = {sample.labels.get("engine"): sample.value for sample in families["shopr1_queue_tokens"].samples}
    assert queued == {"a": 5, "b": 7}  # the HTTP side has neither a queue nor a policy
    assert {sample.labels.get("engine") for sample in families["shopr1_policy_number"].samples} == {"a", "b"}
    sums = {
        (sample.labels["phase"], sample.labels.get("engine")): sample.value
        for sample in families["shopr1_phase_duration_seconds"].samples
        if sample.name.endswith("_sum")
    }
    assert sums == {("prepare", None): 0.1, ("engine", "b"): 0.5}
    assert {sample.labels.get("engine") for sample in families["shopr1_requests"].samples} == {None}


def test_families_of_engines_are_missing_without_engines() -> None:
    metrics = Metrics()
    metrics.record_queue(3)
    here, all_gone = metrics.render().decode(), metrics.render([]).decode()
    assert "shopr1_queue_tokens 3.0" in here
    assert "shopr1_queue_tokens" not in all_gone  # unknown, not 0
    assert "shopr1_build_info" in all_gone
    shown = {family.name for family in text_string_to_metric_families(here)}
    assert ENGINE_FAMILIES - shown == UNSEEN


UNSEEN = {"shopr1_engine_heartbeat_timestamp_seconds"}
"""Families that appear only once a policy is watched."""


@dataclass
class Context:
    """The members of Ray's context that the policy reads."""

    current_num_replicas: int
    total_num_requests: float
    aggregated_metrics: dict[str, dict[str, float]] | None = field(default_factory=dict)


@pytest.mark.parametrize(
    ("queued", "num_requests", "current", "wanted"),
    [
        ({"a": 0.0, "b": 0.0}, 0.0, 2, 0),  # idle: Ray keeps the lowest allowed number
        ({"a": 0.0, "b": 0.0}, 1.0, 2, 1),
        ({"a": 0.0, "b": 0.0}, 9.0, 2, 2),  # all are busy, and queues are empty
        ({"a": 100.0, "b": 0.0}, 9.0, 2, 2),
        ({"a": 100.0, "b": 101.0}, 9.0, 2, 3),
        ({"a": 950.0}, 9.0, 1, 10),
        (None, 0.5, 1, 1),
    ],
)
def test_the_number_of_engines_follows_the_queue(
    queued: dict[str, float] | None, num_requests: float, current: int, wanted: int
) -> None:
    metrics = None if queued is None else {QUEUED_TOKENS: queued}
    number, state = QueuedTokens(target_tokens=100)(Context(current, num_requests, metrics))
    assert (number, state) == (wanted, {})
