"""Keys and scopes: where they are read, which are valid, how they are rotated."""

from pathlib import Path

import pytest

from shopr1_service.errors import SettingsError
from shopr1_service.http.api_keys import ApiKeys
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings, load_settings
from tests.support.http import problem, running

pytestmark = pytest.mark.anyio

KEY = "first.key_of-0123456789~"
OTHER = "second-key-0123456789"


# --- settings ---------------------------------------------------------------------------------------


async def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the trainers\n\n  {KEY}\n{OTHER}\n")
    async with running(api_key_file=file, api_keys=("third-key-0123456789",)) as client:
        for key, status in [
            (KEY, 200),
            (OTHER, 200),
            ("third-key-0123456789", 200),
            ("# of the trainers", 401),
        ]:
            assert (
                await client.get("/info", headers={"Authorization": f"Bearer {key}"})
            ).status_code == status


async def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY, "utf-8-sig")
    async with running(api_key_file=file) as client:
        assert (await client.get("/info", headers={"Authorization": f"Bearer {KEY}"})).status_code == 200


@pytest.mark.parametrize("content", ["", "\n# nothing\n", None])
def test_a_file_without_keys_opens_nothing(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match="api_key_file"):
        create_app(Settings(api_key_file=file), LocalEngine.opener(FakePolicy))


@pytest.mark.parametrize(
    "key", ["short", "with a space in the middle", "a/b/c/d/e/f/g/h/i/j", "%41" * 8, "é" * 20]
)
def test_malformed_keys_are_refused(key: str) -> None:
    with pytest.raises(SettingsError, match="API key 2: must be") as caught:
        create_app(Settings(api_keys=(KEY, key)), LocalEngine.opener(FakePolicy))  # type: ignore[arg-type]
    assert key not in str(caught.value)


def test_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOPR1_API_KEYS", f"{KEY},{OTHER}")
    settings = load_settings()
    assert [key.get_secret_value() for key in settings.api_keys] == [KEY, OTHER]
    assert KEY not in settings.model_dump_json() + repr(settings)
    monkeypatch.setenv("SHOPR1_API_KEY", KEY)  # a misspelt setting
    with pytest.raises(SettingsError, match="unknown environment variable SHOPR1_API_KEY") as caught:
        load_settings()
    assert KEY not in str(caught.value)


def test_the_shims_variables_are_not_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOPR1_CLIENT_API_KEY", KEY)
    assert load_settings().api_keys == ()


# --- scopes -----------------------------------------------------------------------------------------

SCOPED = {
    "score": f"score:{KEY}",
    "metrics": f"metrics:{KEY}",
    "admin": f"admin:{KEY}",
    "plain": KEY,
    "both": f"score+metrics:{KEY}",
}
ALLOWED = {
    "score": {"/info"},
    "metrics": {"/metrics"},
    "admin": {"/info", "/metrics"},
    "plain": {"/info", "/metrics"},
    "both": {"/info", "/metrics"},
}


@pytest.mark.parametrize("name", SCOPED)
@pytest.mark.parametrize("path", ["/info", "/metrics"])
async def test_a_key_is_good_for_its_scopes_only(name: str, path: str) -> None:
    async with running(api_keys=(SCOPED[name],)) as client:
        answered = await client.get(path, headers={"Authorization": f"Bearer {KEY}"})
    if path in ALLOWED[name]:
        assert answered.status_code == 200
    else:
        wanted = {"/info": "score", "/metrics": "metrics"}[path]
        assert problem(answered, 403, "forbidden")["detail"] == f"this key is for {name}, not for {wanted}"


@pytest.mark.parametrize("scopes", ["score+", "+", "", "Score", "score,metrics", "root", "score:metrics"])
def test_malformed_scopes_are_refused(scopes: str) -> None:
    with pytest.raises(
        SettingsError, match=r"API key 1: its scopes must be of score, metrics, admin"
    ) as caught:
        create_app(Settings(api_keys=(f"{scopes}:{KEY}",)), LocalEngine.opener(FakePolicy))  # type: ignore[arg-type]
    assert KEY not in str(caught.value)


# --- rotation ---------------------------------------------------------------------------------------


def rewrite(file: Path, content: str) -> None:
    """As secrets are replaced: a new file under the old name."""
    new = file.with_name("new")
    new.write_text(content)
    new.replace(file)


def accepted(keys: ApiKeys) -> list[bool]:
    return [bool(keys.scopes(key.encode())) for key in (KEY, OTHER)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [1000.0]
    monkeypatch.setattr("shopr1_service.http.api_keys.time.monotonic", lambda: now_s[0])
    return now_s


def test_a_file_is_read_again_when_it_changes(tmp_path: Path, clock: list[float]) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    keys = ApiKeys(file=file)
    assert accepted(keys) == [True, False]
    rewrite(file, f"{KEY}\n{OTHER}\n")
    assert accepted(keys) == [True, False]  # looked at once a second, not at every request
    clock[0] += 1
    assert accepted(keys) == [True, True]
    rewrite(file, OTHER)
    clock[0] += 1
    assert accepted(keys) == [False, True]


@pytest.mark.parametrize("broken", ["", "short", "root:0123456789abcdef", None])
def test_a_broken_file_changes_no_key(
    tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    keys = ApiKeys(file=file)
    if broken is None:
        file.unlink()
    else:
        rewrite(file, broken)
    clock[0] += 1
    assert accepted(keys) == [True, False]
    assert "the previous keys stay valid" in caplog.text
    rewrite(file, OTHER)
    clock[0] += 1
    assert accepted(keys) == [False, True]
