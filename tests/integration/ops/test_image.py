"""The image from a plain Debian and from Python's slim image: run as deployed, compared with the checkout.

Takes minutes and 6 GB for each. On Debian it needs `apt-get install buildah debootstrap`. With podman and
runc it also runs the containers with a read-only root.
"""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest

from shopr1_client import Client
from tests.integration.ops import containers
from tests.integration.ops.containers import Checkout, Chroot, Runner
from tests.support.http import free_port

pytestmark = pytest.mark.timeout(3600)

WAIT_S = 600.0
"""Timeout for all events: a busy machine loads a policy for minutes."""

KEY = "score-0123456789abcdef"
METRICS_KEY = "metrics-0123456789abcdef"
SAME = 1e-5
"""Both are computed in float32 and differ by rounding, about 1e-6 nats times 0.005: the image may have
another build of torch and number of threads. A different token, template or weight changes far more."""
WRITABLE = {"/cache", "/tmp", "/var/tmp", "/run/lock", "/dev/shm", "/dev/mqueue"}
BUILD_TOOLS = ("gcc", "cc", "g++", "make", "pip", "git", "curl")


@pytest.fixture(scope="module", params=["engine", "chroot"])
def runner(request: pytest.FixtureRequest, builder: str) -> Runner:
    """Runners of containers: an engine as in deployments, and buildah, which always works."""
    if request.param == "engine":
        return containers.working_engine(builder) or pytest.skip("no engine runs containers on this machine")
    return Chroot() if builder == "buildah" else pytest.skip("needs buildah")


def printed(runner: Runner, *command: str) -> list[str]:
    return containers.output(*runner.run(*command)).splitlines()


class Container:
    """A service in a container, or without one."""

    def __init__(self, runner: Runner | Checkout, process: "subprocess.Popen[bytes]", port: int) -> None:
        self._runner = runner
        self._process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def wait(self) -> int:
        """Exit code of a container that exits on its own."""
        return self._process.wait(WAIT_S)

    def terminate(self) -> int:
        """Exit code after an orderly stop."""
        if self._process.poll() is None:
            self._runner.terminate(self._process.pid)
        return self.wait()


@contextlib.contextmanager
def started(runner: Runner | Checkout, log: Path, *flags: str) -> Iterator[Container]:
    port = free_port()
    settings = [f"SHOPR1_PORT={port}", "SHOPR1_DTYPE=float32", "SHOPR1_DEVICE=cpu"]
    command = runner.serve(*(f"--env={setting}" for setting in settings), *flags)
    with log.open("wb") as file:
        container = Container(runner, subprocess.Popen(command, stdout=file, stderr=file), port)
        try:
            yield container
        finally:
            container.terminate()


@pytest.fixture(scope="module")
def service(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A service that is ready and has two keys."""
    folder = tmp_path_factory.mktemp("service")
    folder.chmod(0o755)
    keys = folder / "api_keys"
    keys.write_text(f"{KEY}\nmetrics:{METRICS_KEY}\n", "utf-8")
    keys.chmod(0o644)  # as in docker/make_secrets.sh: the container has a different user
    mounted = ("--volume", f"{keys}:/mnt/api_keys:ro", "--env", "SHOPR1_API_KEY_FILE=/mnt/api_keys")
    with started(runner, folder / "log", *mounted) as container:
        wait_until_ready(container)
        yield container


def wait_until_ready(container: Container) -> None:
    with Client(container.url, timeout_s=WAIT_S) as client:
        client.wait_until_ready(WAIT_S)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Rewards from the service of the checkout."""
    with started(Checkout(), tmp_path_factory.mktemp("checkout") / "log") as checkout:
        wait_until_ready(checkout)
        return rewards(post(checkout.url, None))


def example() -> dict[str, Any]:
    """A request with a prompt of realistic length and good and bad completions."""
    lines = (containers.ROOT / "examples" / "sessions.jsonl").read_text("utf-8").splitlines()
    session = json.loads(lines[0])
    return {"groups": [{name: session[name] for name in ("prompt", "ground_truth", "completions")}]}


def post(url: str, key: str | None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{url}/score", json=example(), headers=headers, timeout=WAIT_S)


def rewards(answered: httpx.Response) -> list[float]:
    assert answered.status_code == 200, answered.text
    return [reward["reward"] for reward in answered.json()["groups"][0]["rewards"]]


# --- contents --------------------------------------------------------------------------------------


def test_image_configuration(builder: str) -> None:
    config = containers.configuration(builder)
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["shopr1", "serve"]
    assert config["StopSignal"] == "SIGTERM"
    assert set(config["ExposedPorts"]) == {"8000/tcp"}
    assert set(config["Volumes"]) == {"/cache"}
    assert config["Labels"]["org.opencontainers.image.version"] == version("shopr1")


def test_image_contains_no_build_configuration(builder: str) -> None:
    environment = " ".join(containers.configuration(builder)["Env"])
    assert "PIP_" not in environment


def test_image_runs_as_an_unprivileged_user(runner: Runner) -> None:
    assert printed(runner, "id", "-u") == ["10001"]


def test_writable_directories(runner: Runner) -> None:
    assert printed(runner, "sh", "-c", "touch /cache/x && rm /cache/x && touch /tmp/x && rm /tmp/x") == []
    look = "find / -xdev -writable ! -type l 2> /dev/null || true"
    assert set(printed(runner, "sh", "-c", look)) <= WRITABLE


def test_image_has_no_build_tools(runner: Runner) -> None:
    look = f"for tool in {' '.join(BUILD_TOOLS)}; do command -v $tool; done; true"
    assert printed(runner, "sh", "-c", look) == []


def test_image_has_no_caches_and_no_sources(runner: Runner) -> None:
    look = "ls -d /src /root/.cache /etc/pip.conf /opt/pip /var/lib/apt/lists/*Packages* 2> /dev/null; true"
    assert printed(runner, "sh", "-c", look) == []


# --- behaviour --------------------------------------------------------------------------------------


def test_rewards_equal_those_of_the_checkout(expected: list[float], service: Container) -> None:
    assert len(set(expected)) > 3
    assert rewards(post(service.url, KEY)) == pytest.approx(expected, abs=SAME)


def test_readiness_needs_no_key(service: Container) -> None:
    assert httpx.get(f"{service.url}/health/ready", timeout=WAIT_S).json() == {"status": "ready"}


def test_health_check(service: Container, runner: Runner) -> None:
    for port, code in ((service.port, "0"), (free_port(), "1")):
        look = f"SHOPR1_PORT={port} healthcheck /health/ready; echo $?"
        assert printed(runner, "sh", "-c", look) == [code]


def test_scoring_needs_a_key(service: Container) -> None:
    assert post(service.url, None).status_code == 401
    assert post(service.url, "a-key-that-nobody-has-given").status_code == 401
    assert post(service.url, METRICS_KEY).status_code == 403


def test_metrics_need_the_metrics_key(service: Container) -> None:
    headers = {"Authorization": f"Bearer {METRICS_KEY}"}
    answered = httpx.get(f"{service.url}/metrics", headers=headers, timeout=WAIT_S)
    assert answered.status_code == 200
    assert "shopr1_policy_info" in answered.text


def test_stop_signal_gives_exit_code_0(service: Container) -> None:
    # The last test, because it stops the service within the time limit of a supervisor.
    assert service.terminate() == 0


def test_start_without_a_key_is_refused(runner: Runner, tmp_path: Path) -> None:
    with started(runner, tmp_path / "log") as container:
        assert container.wait() == 2
    assert "there are no API keys" in (tmp_path / "log").read_text("utf-8")
