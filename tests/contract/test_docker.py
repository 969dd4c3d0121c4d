"""The image's build context, the scripts of docker/, and docs/deploy.md."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shopr1_service.http.api_keys import ApiKeys
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.settings import Settings
from tests.support.http import served

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DEPLOY = ROOT / "docs" / "deploy.md"
KEY = re.compile("[0-9a-f]{64}")


# --- the secrets ------------------------------------------------------------------------------------


def make_secrets(folder: Path) -> dict[str, str]:
    subprocess.run([str(DOCKER / "make_secrets.sh"), str(folder)], check=True, capture_output=True)
    return {file.name: file.read_text("utf-8") for file in folder.iterdir()}


def test_make_secrets_writes_every_secret(tmp_path: Path) -> None:
    secrets = make_secrets(tmp_path / "secrets")
    assert set(secrets) == {"api_keys", "metrics_key", "grafana_password"}
    key, metrics_key = secrets["api_keys"].splitlines()
    assert KEY.fullmatch(key)
    assert KEY.fullmatch(secrets["metrics_key"].strip())
    assert metrics_key == f"metrics:{secrets['metrics_key'].strip()}"
    assert KEY.fullmatch(secrets["grafana_password"].strip())
    assert len({key, *(text.strip() for text in secrets.values())}) == 4


def test_make_secrets_keeps_existing_secrets(tmp_path: Path) -> None:
    assert make_secrets(tmp_path) == make_secrets(tmp_path)


def test_other_users_of_the_machine_cannot_read_the_secrets(tmp_path: Path) -> None:
    # The containers can: each file is mounted separately, and containers have different users.
    folder = tmp_path / "secrets"
    make_secrets(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_make_secrets_reports_a_missing_metrics_key(tmp_path: Path) -> None:
    (tmp_path / "api_keys").write_text("0123456789abcdef\n", "utf-8")
    completed = subprocess.run(
        [str(DOCKER / "make_secrets.sh"), str(tmp_path)], check=False, capture_output=True, encoding="utf-8"
    )
    assert completed.returncode == 1
    assert "add the line `metrics:" in completed.stderr


# --- the image --------------------------------------------------------------------------------------


def test_files_copied_into_the_image_are_not_ignored() -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text("utf-8")
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.*) \S+$", dockerfile, re.M)
        for name in line.split()
    }
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_image_and_makefile_have_the_same_embedded_policy() -> None:
    [wanted] = re.findall(r"^EMBEDDED_POLICY := (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert wanted in (DOCKER / "Dockerfile").read_text("utf-8")


@pytest.mark.parametrize("name", ["build.sh", "make_secrets.sh", "healthcheck.py"])
def test_scripts_are_executable(name: str) -> None:
    assert os.access(DOCKER / name, os.X_OK)


# --- the health check -------------------------------------------------------------------------------


def health_check(path: str, port: str) -> int:
    command = [sys.executable, "-IS", str(DOCKER / "healthcheck.py"), path]
    return subprocess.run(
        command, env={"SHOPR1_PORT": port}, check=False, capture_output=True, timeout=60
    ).returncode


def test_the_health_check() -> None:
    with served(FakePolicy()) as url:
        port = url.rpartition(":")[2]
        assert health_check("/health/live", port) == 0
        assert health_check("/health/ready", port) == 0
        assert health_check("/no/such/path", port) == 1
    assert health_check("/health/live", port) == 1


# --- docs/deploy.md ---------------------------------------------------------------------------------


def test_links_and_make_targets_of_the_page_exist() -> None:
    text = DEPLOY.read_text("utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (DEPLOY.parent / link).exists()] == []
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert set(re.findall(r"make ([a-z-]+)", text)) <= set(re.findall(r"^([a-z-]+):", makefile, re.M))


def test_variables_of_the_page_exist() -> None:
    named = set(re.findall(r"\b(?:DEPLOY|SHOPR1)_[A-Z0-9_]+", DEPLOY.read_text("utf-8")))
    example = set(re.findall(r"^#?([A-Z][A-Z0-9_]*)=", (DOCKER / ".env.example").read_text("utf-8"), re.M))
    settings = {f"SHOPR1_{name.upper()}" for name in Settings.model_fields}
    assert named <= example | settings


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_keys_from_the_commands_of_the_page_are_valid(tmp_path: Path) -> None:
    commands = re.findall(r"^\$ (.*openssl.*)$", DEPLOY.read_text("utf-8"), re.M)
    assert len(commands) == 2
    (tmp_path / "docker" / "secrets").mkdir(parents=True)
    for command in commands:
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    ApiKeys.of(Settings(api_key_file=tmp_path / "docker" / "secrets" / "api_keys"))
