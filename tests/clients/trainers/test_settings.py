"""The shims' settings: all are checked at the first use, and errors name variable and value."""

from typing import Any

import pytest

from shopr1_client import SettingsError
from shopr1_client.trainers.service import Service
from shopr1_client.trainers.settings import DEFAULT_URL, PREFIX, ClientSettings

KEY = "sk-0123456789abcdef"  # pragma: allowlist secret


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ClientSettings.model_fields:
        monkeypatch.delenv(f"{PREFIX}{name.upper()}", raising=False)
    monkeypatch.delenv(f"{PREFIX}URL", raising=False)


def found(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Service:
    for name, value in variables.items():
        monkeypatch.setenv(PREFIX + name, value)
    return Service.find()


def test_defaults() -> None:
    service = Service.find()
    assert service.urls == (DEFAULT_URL,)
    assert (service.api_key, service.recipe, service.unscorable, service.run, service.proxy) == (None,) * 5
    assert (service.demand, service.demand_wait_s) == (None, 60.0)


def test_every_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    service = found(
        monkeypatch,
        URL="http://a:1,https://b/x/",
        API_KEY=KEY,
        RECIPE="mine",
        UNSCORABLE="-1.5",
        RUN="grpo-7",
        DEMAND="at_least",
        DEMAND_WAIT_S="0.5",
        CHAT_TEMPLATE_KWARGS='{"enable_thinking": false}',
        PROXY="direct",
    )
    assert service.model_dump() == {
        "urls": ("http://a:1", "https://b/x"),
        "api_key": KEY,
        "recipe": "mine",
        "unscorable": -1.5,
        "run": "grpo-7",
        "demand": "at_least",
        "demand_wait_s": 0.5,
        "chat_template_kwargs": {"enable_thinking": False},
        "proxy": "direct",
    }
    assert KEY not in repr(service)


def test_empty_variables_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name.upper().replace("URLS", "URL") for name in ClientSettings.model_fields]
    assert found(monkeypatch, **dict.fromkeys(names, "")) == Service()


@pytest.mark.parametrize(
    "given",
    [
        "http://a,http://b",
        " http://a , http://b ",
        "http://a,http://b,",
        ",http://a,,http://b/",
        "http://a/\n,http://b",
    ],
)
def test_blanks_and_commas_around_urls(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, URL=given).urls == ("http://a", "http://b")
    assert Service.find(given).urls == ("http://a", "http://b")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("URL", " "),
        ("URL", ","),
        ("URL", "reward:8000"),
        ("URL", "http://a http://b"),
        ("URL", "http://a;http://b"),
        ("URL", "http://a,ftp://b"),
        ("URL", "http://:8000"),
        ("URL", "http://a:port"),
        ("URL", "http://a:99999"),
        ("UNSCORABLE", "nan"),
        ("UNSCORABLE", "inf"),
        ("UNSCORABLE", "-Infinity"),
        ("UNSCORABLE", "1e999"),
        ("UNSCORABLE", "error"),
        ("UNSCORABLE", " "),
        ("RUN", "no label"),
        ("RUN", "x" * 65),
        ("RUN", "run\n"),
        ("DEMAND", "newest"),
        ("DEMAND_WAIT_S", "-1"),
        ("DEMAND_WAIT_S", "nan"),
        ("DEMAND_WAIT_S", "a minute"),
        ("CHAT_TEMPLATE_KWARGS", "enable_thinking"),
        ("CHAT_TEMPLATE_KWARGS", "[1]"),
        ("PROXY", "proxy:3128"),
        ("PROXY", "none"),
        ("PROXY", "http://["),
    ],
)
def test_wrong_values_are_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as caught:
        found(monkeypatch, **{name: value})
    assert str(caught.value).startswith(f"{PREFIX}{name} is {value!r}: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROXY", "socks4://user:invented@proxy.test"),  # pragma: allowlist secret
        ("PROXY", "user:invented@proxy.test:3128"),
        ("URL", "http://reward, http://user:invented@reward:99999"),  # pragma: allowlist secret
    ],
)
def test_passwords_in_urls_are_not_shown(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=f"^{PREFIX}{name} is ") as caught:
        found(monkeypatch, **{name: value})
    assert "invented" not in str(caught.value)


@pytest.mark.parametrize("key", [" ", f"{KEY}\n", f" {KEY}", "ключ", "a\x00b"])
def test_a_key_that_no_header_can_hold_is_named_but_not_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", {f"{PREFIX}API_KEY": key})
    with pytest.raises(SettingsError, match=f"^{PREFIX}API_KEY is not valid: ") as caught:
        Service.find()
    assert key.strip() == "" or key not in str(caught.value)


def test_all_wrong_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as caught:
        found(monkeypatch, URL="nowhere", UNSCORABLE="nan", DEMAND="any")
    assert all(f"{PREFIX}{name} is " in str(caught.value) for name in ("URL", "UNSCORABLE", "DEMAND"))


def test_a_misspelt_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SettingsError, match=f"unknown variable {PREFIX}UNSCOREABLE; there are: {PREFIX}URL, "
    ):
        found(monkeypatch, UNSCOREABLE="0")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"unscorable": float("nan")}, "`unscorable` is nan: "),
        ({"unscorable": "none"}, "`unscorable` is 'none': "),
        ({"url": "reward"}, "`urls` is 'reward': "),
        ({"run": "a b"}, "`run` is 'a b': "),
    ],
)
def test_arguments_are_checked_too(
    arguments: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As verl passes them from its configuration."""
    monkeypatch.setenv(f"{PREFIX}UNSCORABLE", "0.5")
    with pytest.raises(SettingsError) as caught:
        Service.find(**arguments)
    assert str(caught.value).startswith(named)


def test_arguments_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}UNSCORABLE", "0.5")
    monkeypatch.setenv(f"{PREFIX}RECIPE", "theirs")
    service = Service.find(unscorable=0.0, recipe="mine")
    assert (service.unscorable, service.recipe) == (0.0, "mine")
    assert Service.find().unscorable == 0.5
