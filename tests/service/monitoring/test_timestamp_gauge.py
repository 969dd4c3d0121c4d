"""Gauges of times, on clocks that are set."""

import time

import pytest
from prometheus_client import CollectorRegistry

from shopr1_service.monitoring.timestamp_gauge import TimestampGauge


def test_a_clock_that_is_set_does_not_change_the_age(monkeypatch: pytest.MonkeyPatch) -> None:
    gauge = TimestampGauge("x_timestamp_seconds", "When.", "run", registry=CollectorRegistry())
    monkeypatch.setattr(time, "monotonic", lambda: 50.0)
    gauge.set_now("r")
    monkeypatch.setattr(time, "monotonic", lambda: 57.0)
    for now_s in (1000.0, 900_000.0):
        monkeypatch.setattr(time, "time", lambda now_s=now_s: now_s)
        [family] = gauge.collect()
        assert [(s.labels, s.value) for s in family.samples] == [({"run": "r"}, now_s - 7)]


def test_removed_and_unknown_series_have_no_sample() -> None:
    gauge = TimestampGauge("x_timestamp_seconds", "When.", "run", registry=CollectorRegistry())
    gauge.set_now("r")
    gauge.remove("r")
    gauge.remove("never")
    [family] = gauge.collect()
    assert family.samples == []
