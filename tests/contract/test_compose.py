"""Compose configuration: consistent with itself, its example and the settings, and closed to the network."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from shopr1_service.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
OURS = ("shopr1", "shopr1-cpu", "shopr1-ray")
COMPOSE_VARIABLES = {"COMPOSE_PROFILES"}


def read(path: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", yaml.safe_load(path.read_text("utf-8")))


COMPOSE = read(DOCKER / "compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROMETHEUS = read(DOCKER / "prometheus" / "prometheus.yml")


def example_variables() -> dict[str, str]:
    """The variables of .env.example with their values, including commented-out ones."""
    return dict(re.findall(r"^#?([A-Z][A-Z0-9_]*)=(.*)$", (DOCKER / ".env.example").read_text("utf-8"), re.M))


def defaults() -> dict[str, str]:
    """The variables that compose.yaml substitutes, with their defaults."""
    return dict(re.findall(r"\$\{([A-Z0-9_]+):-([^}]*)\}", (DOCKER / "compose.yaml").read_text("utf-8")))


def passed_through(service: dict[str, Any]) -> set[str]:
    """The variables that a container or a build inherits unchanged, if they are set."""
    given = {**service.get("environment", {}), **service.get("build", {}).get("args", {})}
    return {name for name, value in given.items() if value is None}


def substituted(text: str) -> str:
    return re.sub(r"\$\{[A-Z0-9_]+:-([^}]*)\}", r"\1", text)


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Targets of a service's volumes, by source."""
    parts = [substituted(volume).split(":") for volume in service.get("volumes", [])]
    return {part[0]: part[1] for part in parts}


def each_service() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", SERVICES)


def each_service_of_the_project() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", OURS)


# --- compose.yaml -----------------------------------------------------------------------------------


def test_compose_file_follows_the_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    completed = subprocess.run(
        [*command, str(DOCKER / "compose.yaml")], capture_output=True, encoding="utf-8", check=False
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr


def test_variables_equal_those_of_the_example() -> None:
    used = {*defaults(), *COMPOSE_VARIABLES}.union(*map(passed_through, SERVICES.values()))
    assert used == set(example_variables())


def test_every_variable_has_a_default_or_is_optional() -> None:
    text = (DOCKER / "compose.yaml").read_text("utf-8")
    assert text.count("${") == len(re.findall(r"\$\{[A-Z0-9_]+:-[^}]+\}", text))


def test_the_example_shows_the_defaults() -> None:
    shown = example_variables()
    # The default is a volume; the example shows a path.
    assert {name: shown[name] for name in defaults() if name != "DEPLOY_MODELS"} == {
        name: value for name, value in defaults().items() if name != "DEPLOY_MODELS"
    }


def test_settings_exist_with_the_given_defaults() -> None:
    named = {name for service in SERVICES.values() for name in service.get("environment", {})}
    fields = {f"{ENV_PREFIX}{name.upper()}": field for name, field in Settings.model_fields.items()}
    assert {name for name in named if name.startswith(ENV_PREFIX)} <= set(fields)
    shown = {name: value for name, value in example_variables().items() if name in fields}
    assert set(shown) == {name for name in example_variables() if name.startswith(ENV_PREFIX)}
    for name in ("RECIPE", "DTYPE", "MEMORY_SHARE", "MAX_QUEUE_TOKENS", "SHUTDOWN_GRACE_S", "LOG_LEVEL"):
        assert shown[ENV_PREFIX + name] == str(fields[ENV_PREFIX + name].default)


@each_service()
def test_mounted_files_are_in_the_repository(name: str) -> None:
    sources = [source for source in mounts(SERVICES[name]) if source.startswith(".")]
    assert [source for source in sources if not (DOCKER / source).exists()] == []
    volumes = {source for source in mounts(SERVICES[name]) if not source.startswith((".", "/"))}
    assert volumes <= set(COMPOSE["volumes"])


@each_service()
def test_secrets_are_declared(name: str) -> None:
    secrets = set(SERVICES[name].get("secrets", []))
    assert secrets <= set(COMPOSE["secrets"])
    environment = SERVICES[name].get("environment", {}).values()
    read_from = {str(value).removeprefix("/run/secrets/") for value in environment if "/run/" in str(value)}
    assert read_from <= secrets


@each_service()
def test_ports_are_bound_to_loopback_by_default(name: str) -> None:
    for port in SERVICES[name]["ports"]:
        assert substituted(port).startswith("127.0.0.1:")


@each_service()
def test_containers_are_restricted(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged", False)


@each_service()
def test_containers_restart_and_rotate_their_logs(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert service["healthcheck"]["start_period"]


@pytest.mark.parametrize("name", sorted(set(SERVICES) - set(OURS)))
def test_third_party_images_are_pinned(name: str) -> None:
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


@each_service_of_the_project()
def test_the_service_requires_a_key(name: str) -> None:
    environment = SERVICES[name]["environment"]
    assert environment["SHOPR1_API_KEY_FILE"] == "/run/secrets/api_keys"
    assert "api_keys" in SERVICES[name]["secrets"]
    assert "SHOPR1_ALLOW_UNAUTHENTICATED" not in environment


@each_service_of_the_project()
def test_open_requests_finish_before_the_container_is_killed(name: str) -> None:
    grace_s = int(substituted(SERVICES[name]["stop_grace_period"]).removesuffix("s"))
    assert grace_s > Settings().shutdown_grace_s


@each_service_of_the_project()
def test_writable_directories(name: str) -> None:
    assert mounts(SERVICES[name])["cache"] == "/cache"
    assert SERVICES[name]["tmpfs"][0].startswith("/tmp:")
    dockerfile = (DOCKER / "Dockerfile").read_text("utf-8")
    assert {"HOME=/cache", "TMPDIR=/tmp"} <= set(dockerfile.split())


def test_gpus_are_reserved_for_gpu_profiles() -> None:
    assert SERVICES["shopr1"]["profiles"] == ["gpu"]
    [device] = SERVICES["shopr1"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert SERVICES["shopr1-cpu"]["profiles"] == ["cpu"]
    assert "deploy" not in SERVICES["shopr1-cpu"]
    assert SERVICES["shopr1-ray"]["profiles"] == ["ray"]
    [devices] = SERVICES["shopr1-ray"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices["count"] == "all"


# --- Prometheus and Grafana -------------------------------------------------------------------------


def test_prometheus_finds_the_service_of_every_profile() -> None:
    [job] = PROMETHEUS["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    for name in set(OURS) - {"shopr1"}:
        assert SERVICES[name]["networks"]["default"]["aliases"] == ["shopr1"]
    assert host == "shopr1"
    assert all(volume.endswith(f":{port}") for name in OURS for volume in SERVICES[name]["ports"])


def test_prometheus_has_its_own_key() -> None:
    [job] = PROMETHEUS["scrape_configs"]
    assert job["authorization"]["credentials_file"] == "/run/secrets/metrics_key"
    assert SERVICES["prometheus"]["secrets"] == ["metrics_key"]


def test_prometheus_finds_its_files() -> None:
    targets = mounts(SERVICES["prometheus"]).values()
    wanted = ["prometheus.yml", *PROMETHEUS["rule_files"]]
    assert {f"/etc/prometheus/{name}" for name in wanted} <= set(targets)
    assert read(DOCKER / "prometheus" / "alerts.yml")["groups"]


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    [source] = read(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = read(provisioning / "dashboards" / "shopr1.yaml")["providers"]
    assert mounts(SERVICES["grafana"])["./grafana/dashboards"] == provider["options"]["path"]
    assert list((DOCKER / "grafana" / "dashboards").glob("*.json"))
