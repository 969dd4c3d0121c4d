import math

import pytest
import torch

from shopr1_service.engine.selection import device_time_s, fastest_right

ERRORS = {"reference": 0.1, "fast": 0.2, "slow": 0.0, "wrong": 0.3, "nan": math.nan}
TIMES_S = {"reference": 2.0, "fast": 1.0, "slow": 3.0, "wrong": 0.1, "nan": 0.1}


def choose(*names: str, limit: float = 0.2) -> str | None:
    return fastest_right({name: name for name in names}, ERRORS.__getitem__, limit, TIMES_S.__getitem__)


def test_numbers_come_before_time(caplog: pytest.LogCaptureFixture) -> None:
    assert choose(*ERRORS) == "fast"
    assert choose(*ERRORS, limit=0.1) == "reference"
    assert "wrong is not used: its error is 0.3, more than 0.2" in caplog.text
    assert "nan is not used" in caplog.text


def test_a_way_that_raises_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    assert choose("unknown", "slow") == "slow"
    assert "unknown is not used: KeyError('unknown')" in caplog.text


def test_only_right_ways_are_timed() -> None:
    timed: list[str] = []

    def time_s_of(name: str) -> float:
        timed.append(name)
        return TIMES_S[name]

    fastest_right({name: name for name in ERRORS}, ERRORS.__getitem__, 0.2, time_s_of)
    assert timed == ["reference", "fast", "slow"]


def test_none_may_be_right() -> None:
    assert choose("wrong", "nan") is None


def test_an_unusable_device_ends_the_choice() -> None:
    def raise_(_name: str) -> float:
        raise torch.AcceleratorError("illegal memory access")

    with pytest.raises(torch.AcceleratorError):
        fastest_right({"fast": "fast", "slow": "slow"}, raise_, 1.0, TIMES_S.__getitem__)


def test_time_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of five calls between waits for the device; the first call is not timed."""
    events: list[str] = []
    readings_s = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0, 30.0, 33.0, 40.0, 49.0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr("time.perf_counter", lambda: next(readings_s))
    assert device_time_s(lambda: events.append("call")) == 3.0
    assert events == ["call", *["wait", "call", "wait"] * 5]
