"""Requests that count, and tries of one that do not."""

import pytest

from shopr1_service.scoring import counted_requests as module
from shopr1_service.scoring.counted_requests import CountedRequests


def test_tries_of_a_request_count_once() -> None:
    counted = CountedRequests()
    assert [counted.add(key) for key in (b"a", b"b", b"a", b"a", b"b")] == [True, True, False, False, False]


def test_requests_without_a_key_are_all_counted() -> None:
    counted = CountedRequests()
    assert [counted.add(None) for _ in range(3)] == [True] * 3


def test_keys_are_forgotten_after_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("shopr1_service.scoring.counted_requests.time.monotonic", lambda: clock[0])
    counted = CountedRequests()
    for clock[0], is_new in ((100.0, True), (699.9, False), (700.0, True), (1299.9, False)):
        assert counted.add(b"a") is is_new


def test_the_number_of_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COUNTED", 3)
    counted = CountedRequests()
    assert [counted.add(bytes([i])) for i in range(4)] == [True] * 4
    assert [counted.add(bytes([i])) for i in (1, 2, 3)] == [False] * 3
    assert counted.add(b"\0")  # the oldest one was dropped
    assert len(counted._until_s) == 3
