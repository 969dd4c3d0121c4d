"""Paths of the settings that cannot be used, found at start."""

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from shopr1_service.errors import SettingsError
from shopr1_service.server import uvicorn_server
from shopr1_service.server.path_checks import check_paths
from shopr1_service.settings import Settings
from tests.support.http import free_port

NOT_WRITABLE = "/proc"
"""Not even for root."""


def flaws(**settings: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        check_paths(Settings(**settings))
    return str(caught.value)


def test_good_paths(tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{{ messages }}")
    cache = tmp_path / "new" / "cache"
    check_paths(
        Settings(
            staging_dir=tmp_path,
            policy_roots=(tmp_path, Path("/")),
            cache_dir=cache,
            chat_templates=(template,),
        )
    )
    check_paths(Settings())
    # Nothing is left of the attempts.
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "cache", "plain.jinja"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "No such file or directory"),
        ("file", "Not a directory"),
        ("link", "No such file or directory"),
        ("\0", "embedded null byte"),
        (NOT_WRITABLE, ""),
    ],
)
def test_a_staging_dir_that_cannot_be_written(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    path = str(tmp_path / name)
    message = flaws(staging_dir=path)
    assert message.startswith(f"staging_dir: cannot write into {path!r}: ")
    assert reason in message


@pytest.mark.parametrize(("name", "reason"), [("missing", "No such file"), ("file", "Not a directory")])
def test_policy_roots_that_cannot_be_listed(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    message = flaws(policy_roots=f"{tmp_path}, {tmp_path / name}")
    assert message.startswith(f"policy_roots: cannot list {str(tmp_path / name)!r}: {reason}")


@pytest.mark.parametrize("name", ["file", "file/new", NOT_WRITABLE, f"{NOT_WRITABLE}/new"])
def test_a_cache_dir_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / name)
    assert flaws(cache_dir=path).startswith(f"cache_dir: cannot write into {path!r}: ")


@pytest.mark.parametrize("content", [None, b"{% if", b"\xff"])
def test_chat_templates_that_are_none(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    assert flaws(chat_templates=str(file)).startswith(f"chat_templates: {file}: ")


def test_all_are_named_together(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    message = flaws(staging_dir=missing, policy_roots=(missing, missing / "2"), cache_dir=NOT_WRITABLE)
    assert re.findall(r"(\w+): cannot", message) == [
        "staging_dir",
        "policy_roots",
        "policy_roots",
        "cache_dir",
    ]


def test_without_a_staging_dir_a_system_without_one_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A service that is never updated needs none."""

    def fail() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    with caplog.at_level(logging.WARNING):
        check_paths(Settings())
    assert "updates will fail: staging_dir is not set, and No usable temporary directory" in caplog.text


def test_the_server_checks_them_before_it_loads_the_policy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loads: list[object] = []
    monkeypatch.setattr(uvicorn_server, "load_policy", lambda *args: loads.append(args))
    with pytest.raises(SettingsError, match=r"^staging_dir: cannot write into "):
        uvicorn_server.serve(Settings(port=free_port(), staging_dir=tmp_path / "missing"))
    assert not loads
