"""The profile `cpu` of compose.yaml with a real Prometheus: its commands, environment, files and secrets.

No engine of containers is needed: buildah runs each service in its root file system. All share one network, a
namespace of its own with the services' names in /etc/hosts. Grafana is not run. Prometheus evaluates every
query of its dashboard instead.
"""

import contextlib
import ctypes
import functools
import math
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import safetensors.torch
import torch
import yaml

from shopr1_client import Client
from tests.integration.ops import containers
from tests.integration.ops.containers import Chroot
from tests.integration.ops.test_prometheus import ADMIN_KEY, PANELS, SCORE_KEY, burst, substituted
from tests.support.prometheus import Prometheus, binary, until

pytestmark = pytest.mark.timeout(3600)

DOCKER = containers.ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
PROFILE = "cpu"
WAIT_S = 600.0
CLONE_NEWNET = 0x40000000
MAX_SEQUENCE_TOKENS = 1024
"""A prompt of `burst` exceeds it."""

_T = TypeVar("_T")


# --- one network ------------------------------------------------------------------------------------


class Network:
    """A network namespace with a loopback interface only."""

    def __init__(self, pid: int) -> None:
        self.prefix = ["nsenter", f"--net=/proc/{pid}/ns/net"]
        self._path = f"/proc/{pid}/ns/net"

    def do(self, function: Callable[[], _T]) -> _T:
        """Result of a function whose new sockets are in this network."""
        results: list[_T] = []
        errors: list[BaseException] = []

        def run() -> None:
            with open(self._path, "rb") as file:  # noqa: PTH123
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                    errors.append(OSError(ctypes.get_errno(), "setns"))
                    return
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]


@contextlib.contextmanager
def network() -> Iterator[Network]:
    command = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"up\n":
                pytest.skip("this machine allows no network namespaces")
            yield Network(process.pid)
        finally:
            process.kill()


# --- compose.yaml -----------------------------------------------------------------------------------


def substituted_variables(value: str) -> str:
    """Text with the defaults of its variables."""
    return re.sub(r"\$\{[A-Z0-9_]+:-([^}]*)\}", r"\1", value)


@dataclass(frozen=True)
class Stack:
    """Files of the stack's containers.

    Attributes:
        volumes: folders of named volumes, by name.
    """

    root: Path
    secrets: Path
    hosts: Path

    def volume(self, source: str) -> Path:
        """A file of the repository, or the folder of a named volume."""
        if source.startswith("."):
            return DOCKER / source
        folder = self.root / "volumes" / source
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
        return folder

    def flags(self, service: dict[str, Any], **environment: str) -> list[str]:
        """Flags of `buildah run` for a service's volumes, secrets, environment."""
        volumes = [substituted_variables(volume).split(":") for volume in service["volumes"]]
        mounts = [f"{self.volume(source)}:{':'.join(rest)}" for source, *rest in volumes]
        mounts += [f"{self.secrets / name}:/run/secrets/{name}:ro" for name in service["secrets"]]
        mounts.append(f"{self.hosts}:/etc/hosts:ro")
        given = {name: value for name, value in service.get("environment", {}).items() if value is not None}
        values = {name: substituted_variables(str(value)) for name, value in given.items()} | environment
        return [
            "--no-hosts",  # buildah would mount this machine's
            *(f"--volume={mount}" for mount in mounts),
            *(f"--env={name}={value}" for name, value in values.items()),
        ]


def services() -> dict[str, dict[str, Any]]:
    """Services of the profile."""
    return {name: each for name, each in COMPOSE["services"].items() if PROFILE in each["profiles"]}


def names_of(name: str, service: dict[str, Any]) -> list[str]:
    """Host names under which others reach a service."""
    return [name, *service.get("networks", {}).get("default", {}).get("aliases", [])]


def write_stack(root: Path) -> Stack:
    """Secrets from the project's script, and the services' host names."""
    secrets, hosts = root / "secrets", root / "hosts"
    subprocess.run([DOCKER / "make_secrets.sh", secrets], check=True, stdout=subprocess.DEVNULL)
    with (secrets / "api_keys").open("a", encoding="utf-8") as file:
        file.write(f"score:{SCORE_KEY}\nadmin:{ADMIN_KEY}\n")
    names = ["localhost", *(alias for name, each in services().items() for alias in names_of(name, each))]
    hosts.write_text(f"127.0.0.1 {' '.join(names)}\n", "utf-8")
    hosts.chmod(0o644)
    for path in (root, secrets):
        path.chmod(0o755)  # each file is mounted; the users of the containers differ
    return Stack(root, secrets, hosts)


@contextlib.contextmanager
def started(inside: Network, container: Chroot, log: Path, *command: str) -> Iterator[None]:
    """Run a container until the end, which must be an orderly one."""
    with log.open("wb") as file:
        process = subprocess.Popen([*inside.prefix, *command], stdout=file, stderr=file)
        try:
            yield
        finally:
            if process.poll() is None:
                container.terminate(process.pid)
            code = process.wait(WAIT_S)
    assert code == 0, log.read_text("utf-8")[-2000:]


@contextlib.contextmanager
def service(stack: Stack, inside: Network) -> Iterator[Chroot]:
    given, container = services()["shopr1-cpu"], Chroot()
    flags = stack.flags(
        given,
        SHOPR1_DTYPE="float32",
        SHOPR1_MAX_SEQUENCE_TOKENS=f"{MAX_SEQUENCE_TOKENS}",
        OMP_NUM_THREADS="2",
    )
    with started(inside, container, stack.root / "service.log", *container.serve(*flags)):
        inside.do(lambda: _wait_until_ready("http://127.0.0.1:8000"))
        yield container


def _wait_until_ready(url: str) -> None:
    with Client(url, timeout_s=WAIT_S) as client:
        client.wait_until_ready(WAIT_S)


@contextlib.contextmanager
def monitoring(stack: Stack, inside: Network) -> Iterator[Prometheus]:
    """Debian's Prometheus in a plain Debian, with the command and files of compose.yaml."""
    given, container = services()["prometheus"], Chroot(containers.BASE)
    for name in ("prometheus", "promtool"):
        container.copy(binary(name), f"/bin/{name}")
    arguments = [substituted_variables(each) for each in given["command"]]
    command = container.run_with(stack.flags(given), "prometheus", *arguments)
    log = stack.root / "prometheus.log"
    client = httpx.Client(base_url="http://127.0.0.1:9090", timeout=WAIT_S)
    with started(inside, container, log, *command), client:
        ready = functools.partial(client.get, "/-/ready")
        until(lambda: inside.do(ready).is_success or None, "Prometheus is ready", WAIT_S)
        yield Prometheus(client)


# --- the tests --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """The running stack, and what asks inside its network."""

    inside: Network
    prometheus: Prometheus
    service: Chroot

    def values(self, expr: str) -> list[float]:
        return self.inside.do(lambda: self.prometheus.values(expr))


@pytest.fixture(scope="module")
def running(builder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The stack after two bursts of all kinds of requests, each before a scrape, and an update."""
    if builder != "buildah":
        pytest.skip("needs buildah")
    stack = write_stack(tmp_path_factory.mktemp("stack"))
    with network() as inside, service(stack, inside) as container, monitoring(stack, inside) as prometheus:
        stack_running = Running(inside, prometheus, container)
        until(lambda: stack_running.values('up{job="shopr1"} == 1') or None, "the service is scraped", WAIT_S)
        for number in range(2):
            _use(stack_running, number)
        yield stack_running


def _use(running: Running, number: int) -> None:
    """An update, requests of all kinds, and a scrape."""
    running.inside.do(lambda: _update(f"{number}"))
    running.inside.do(lambda: burst("http://127.0.0.1:8000", number, has_fallback=False))
    expr = f"sum(shopr1_rollouts_total) > {20 * (number + 1)}"  # 20 of two runs, and more of others
    until(lambda: running.values(expr) or None, "the rollouts are scraped", WAIT_S)


def _update(version: str) -> None:
    content = safetensors.torch.save({"model.norm.weight": torch.ones(576)})
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    params = {"version": version, "partial": "true"}
    url = "http://127.0.0.1:8000/policy/weights"
    httpx.put(url, params=params, content=content, headers=headers, timeout=WAIT_S).raise_for_status()


def test_prometheus_scrapes_the_service_by_its_name(running: Running) -> None:
    [target] = running.inside.do(lambda: running.prometheus.get("targets"))["activeTargets"]
    assert target["scrapeUrl"] == "http://shopr1:8000/metrics"
    assert (target["health"], target["lastError"]) == ("up", "")


def test_all_rules_are_evaluated_without_errors(running: Running) -> None:
    def evaluated() -> list[Any] | None:
        groups = running.inside.do(lambda: running.prometheus.get("rules"))["groups"]
        rules = [rule for each in groups for rule in each["rules"]]
        return None if any(rule["health"] == "unknown" for rule in rules) else rules

    rules = until(evaluated, "all rules are evaluated", WAIT_S)
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_of_the_dashboard_has_data(running: Running, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expr = substituted(target["expr"], "grpo-1")
        assert any(map(math.isfinite, running.values(expr))), expr


def test_health_check_of_the_service(running: Running) -> None:
    """The one of Prometheus, `promtool check ready`, is newer than Debian's promtool."""
    [kind, *command] = services()["shopr1-cpu"]["healthcheck"]["test"]
    assert kind == "CMD"
    run = [*running.inside.prefix, *running.service.run(*command)]
    ran = subprocess.run(run, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
