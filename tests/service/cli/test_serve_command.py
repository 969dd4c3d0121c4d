"""How `shopr1 serve` ends, and its last line."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from shopr1_service.cli.serve_command import serve_until_a_signal
from shopr1_service.errors import SettingsError
from shopr1_service.server import uvicorn_server
from shopr1_service.settings import Settings
from tests.support.command_line import Run

JSON, TEXT = {"log_format": "json", "port": "0"}, {"log_format": "text", "port": "0"}


@pytest.fixture(autouse=True)
def unfreeze() -> Iterator[None]:
    """Let the collector see all objects again, for other tests."""
    yield
    gc.unfreeze()


def test_the_exit_code_is_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.enumerate", list)  # of other tests
    for code in (0, 1):
        monkeypatch.setattr(uvicorn_server, "serve", lambda _settings, code=code: code)
        assert serve_until_a_signal(JSON, None) == code


def test_the_collector_runs_again_after_the_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.enumerate", list)  # of other tests
    monkeypatch.setattr(uvicorn_server, "serve", lambda _settings: int(gc.isenabled()))
    assert serve_until_a_signal(JSON, None) == 1
    assert gc.get_freeze_count() > 100_000  # objects of the imports


def test_an_expected_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_until_a_signal({**JSON, "max_groups": "0"}, None) == 2
    [line] = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["level"], line["message"]) == ("critical", "max_groups: must be greater than 0 (got '0')")
    assert "exception" not in line
    with pytest.raises(SettingsError):
        serve_until_a_signal({**TEXT, "max_groups": "0"}, None)


def test_a_recipe_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("name = 7")
    assert serve_until_a_signal({**JSON, "recipe": str(recipe)}, None) == 2
    line = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert line["message"].startswith(f"{recipe}: name: must be a string (got 7); missing key 'format'")


def test_a_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_settings: Settings) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(uvicorn_server, "serve", fail)
    assert serve_until_a_signal(JSON, None) == 1
    [line] = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["message"], line["exception"]["message"]) == ("the service ends", "a bug")
    assert "RuntimeError" in line["exception"]["stack"]
    with pytest.raises(RuntimeError):
        serve_until_a_signal(TEXT, None)


def test_the_command(shopr1: Run) -> None:
    ended = shopr1("serve", "--set", "max_groups=0", "--set", "log_format=json")
    assert (ended.code, ended.out) == (2, "")
    assert json.loads(ended.err)["message"] == "max_groups: must be greater than 0 (got '0')"
