import time

import pytest

from shopr1_service.engine.heartbeat import Heartbeat


def test_age_is_the_time_since_the_last_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    heartbeat = Heartbeat()
    now_s = 103.0
    assert heartbeat.age_s == 3.0
    heartbeat.beat("as", "a hook")
    assert heartbeat.age_s == 0.0
