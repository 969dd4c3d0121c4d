"""Settings and limits that both clients share."""

import pytest

from shopr1_client import AsyncClient, Client, SettingsError
from shopr1_client.base import BaseClient
from shopr1_client.request_splitting import DEFAULT_LIMITS
from shopr1_client.wire import Info, Limits

URLS = ["http://a", "http://b"]


def info(**limits: int) -> Info:
    return Info.model_construct(limits=DEFAULT_LIMITS.model_copy(update=limits))


def test_a_client_needs_a_server() -> None:
    with pytest.raises(ValueError, match="no server"):
        Client([])


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    "url",
    ["", " ", "no-scheme", "ftp://127.0.0.1", "http://", "http://a:port", "http://a:70000", "http://a b"],
)
def test_a_malformed_url_is_named(client: type[BaseClient], url: str) -> None:
    """Also as one of several: only the prompts that it caches would find out."""
    for given in (url, ["http://a", url]):
        with pytest.raises(SettingsError, match="is not the URL of a server") as caught:
            client(given)
        assert repr(url) in str(caught.value)


def test_blanks_around_a_url() -> None:
    assert BaseClient([" http://a/ ", "http://b\n"])._urls == ["http://a", "http://b"]


@pytest.mark.parametrize("option", ["api_key", "run"])
@pytest.mark.parametrize("value", ["", "a\n", "a\r\nX: b", "ключ"])
def test_malformed_header_values_are_refused(option: str, value: str) -> None:
    with pytest.raises(SettingsError):
        Client("http://a", **{option: value})


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
