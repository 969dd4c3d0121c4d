"""What engines have counted, as Prometheus sees it beside what the HTTP side has."""

import pickle

from prometheus_client.parser import text_string_to_metric_families

from shopr1_service.cluster.engine_metrics import Scrape, labelled
from shopr1_service.monitoring.metrics import ENGINE_FAMILIES, Metrics, Phase


def test_each_number_has_its_engine() -> None:
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
    assert queued == {"a": 5, "b": 7}  # nothing waits in the HTTP side, and it has no policy
    assert {sample.labels.get("engine") for sample in families["shopr1_policy_number"].samples} == {"a", "b"}
    sums = {
        (sample.labels["phase"], sample.labels.get("engine")): sample.value
        for sample in families["shopr1_phase_duration_seconds"].samples
        if sample.name.endswith("_sum")
    }
    assert sums == {("prepare", None): 0.1, ("engine", "b"): 0.5}
    assert {sample.labels.get("engine") for sample in families["shopr1_requests"].samples} == {None}


def test_what_only_an_engine_knows() -> None:
    metrics = Metrics()
    metrics.record_queue(3)
    here, all_gone = metrics.render().decode(), metrics.render([]).decode()
    assert "shopr1_queue_tokens 3.0" in here
    assert "shopr1_queue_tokens" not in all_gone  # not 0: nobody knows
    assert "shopr1_build_info" in all_gone
    shown = {family.name for family in text_string_to_metric_families(here)}
    assert ENGINE_FAMILIES - shown == UNSEEN


UNSEEN = {"shopr1_engine_heartbeat_timestamp_seconds"}
"""There is none before a policy is watched."""
