"""Room for connections when file descriptors run short."""

import logging
import time

import pytest

from shopr1_service.server.open_connections import OpenConnections


class Transport:
    """A transport with this descriptor."""

    def __init__(self, number: int, num_unsent: int) -> None:
        self.number, self.num_unsent, self.is_closed = number, num_unsent, False

    def get_extra_info(self, name: str) -> "Transport":
        assert name == "socket"
        return self

    def fileno(self) -> int:
        return self.number

    def get_write_buffer_size(self) -> int:
        return self.num_unsent

    def close(self) -> None:
        self.is_closed = True


class Idle:
    def __init__(self, number: int = 10, num_unsent: int = 0, *, is_reserve: bool = False) -> None:
        self.transport = Transport(number, num_unsent)
        self.is_reserve = is_reserve

    @property
    def is_closed(self) -> bool:
        return self.transport.is_closed


class Clock:
    """The monotonic clock, s."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def joined(opened: OpenConnections, connection: Idle) -> bool:
    """Whether a new connection is one from the reserve."""
    connection.is_reserve = opened.is_from_reserve(connection)  # type: ignore[arg-type]
    opened.set_idle(connection)  # type: ignore[arg-type]
    return connection.is_reserve


@pytest.mark.parametrize(
    ("max_files", "first"), [(80, 70), (1024, 896), (4096, 3840), (1_048_576, 1_048_320)]
)
def test_an_eighth_is_the_reserve(clock: Clock, max_files: int, first: int) -> None:
    opened = OpenConnections(max_files)
    assert not joined(opened, Idle(first - 1))
    assert joined(opened, Idle(first))


def test_the_longest_idle_makes_room(clock: Clock) -> None:
    opened, old = OpenConnections(80), [Idle(), Idle(), Idle()]
    for each in old:
        joined(opened, each)
        clock.now_s += 1
    opened.set_idle(old[0])  # type: ignore[arg-type]  # it has been used meanwhile
    clock.now_s += 1
    assert not joined(opened, Idle(75))
    assert [each.is_closed for each in old] == [False, True, False]
    assert not joined(opened, Idle(76))
    assert [each.is_closed for each in old] == [False, True, True]


def test_busy_and_new_connections_stay(clock: Clock) -> None:
    opened, busy, new = OpenConnections(80), Idle(), Idle()
    joined(opened, busy)
    opened.set_busy(busy)  # type: ignore[arg-type]
    clock.now_s += 10
    joined(opened, new)
    assert joined(opened, Idle(75))
    assert not busy.is_closed
    assert not new.is_closed


def test_one_from_the_reserve_makes_room_for_another_of_it_only(clock: Clock) -> None:
    """Else busy connections would use up the reserve, one after the other."""
    opened, first = OpenConnections(80), Idle(75)
    assert joined(opened, first)
    clock.now_s += 1
    assert joined(opened, Idle(76))
    assert first.is_closed


def test_unsent_answers_are_not_waited_for(clock: Clock) -> None:
    opened, stalled, free = OpenConnections(80), Idle(num_unsent=1), Idle()
    joined(opened, stalled)
    joined(opened, free)
    clock.now_s += 1
    assert not joined(opened, Idle(75))
    assert (stalled.is_closed, free.is_closed) == (False, True)
    assert joined(opened, Idle(76))


def test_the_log_has_one_line_a_second(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    opened = OpenConnections(80)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            for _ in range(4000):
                clock.now_s += 1 / 4000
                opened.close_idle("[Errno 24] Too many open files")
    assert 3 <= len(caplog.records) <= 4
    assert "no room for more connections: [Errno 24] Too many open files" in caplog.text
