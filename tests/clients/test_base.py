"""Settings and limits that both clients share."""

import pytest

from shopr1_client import Client
from shopr1_client.base import BaseClient
from shopr1_client.request_splitting import DEFAULT_LIMITS
from shopr1_client.wire import Info, Limits

URLS = ["http://a", "http://b"]


def info(**limits: int) -> Info:
    return Info.model_construct(limits=DEFAULT_LIMITS.model_copy(update=limits))


def test_a_client_needs_a_server() -> None:
    with pytest.raises(ValueError, match="no server"):
        Client([])


def test_the_tightest_limit_of_each_kind_is_adopted() -> None:
    client = BaseClient(URLS)
    assert client._learn([info(max_groups=3), info(max_groups=5, max_completions_per_group=2)])
    expected = DEFAULT_LIMITS.model_copy(update={"max_groups": 3, "max_completions_per_group": 2})
    assert client._limits == Limits(**expected.model_dump())
    assert not client._learn([info(max_groups=3, max_completions_per_group=2)])
    assert not client._learn([])


def test_attempts_take_turns_among_the_servers() -> None:
    _, servers = BaseClient(URLS)._tries(URLS)
    assert [next(servers) for _ in range(3)] == ["http://a", "http://b", "http://a"]
