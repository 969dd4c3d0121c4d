"""The image, for real: built from a plain Debian, run as it is deployed, compared with the checkout.

Takes some minutes and 6 GB. On Debian, `apt-get install buildah debootstrap` makes it run, and podman with
runc beside them lets it run the containers with a read-only root.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest

from shopr1_client import Client
from tests.integration.ops import containers
from tests.integration.ops.containers import Checkout, Chroot, Runner

pytestmark = pytest.mark.timeout(3600)

WAIT_S = 600.0
"""Until something that will come should have come: a busy machine loads for minutes."""

KEY = "score-0123456789abcdef"
METRICS_KEY = "metrics-0123456789abcdef"
SAME = 1e-5
"""Both are computed in float32 and differ by rounding, some 1e-6 nats times 0.005: the image may have another
build of torch and other threads. Another token, template or weight changes far more."""
WRITABLE = {"/cache", "/tmp", "/var/tmp", "/run/lock", "/dev/shm", "/dev/mqueue"}
BUILD_TOOLS = ("gcc", "cc", "g++", "make", "pip", "git", "curl")


def skip_unless_possible() -> tuple[str, str]:
    """A builder, and where Debian comes from."""
    builder, mirror = containers.find_builder(), containers.archive()
    if builder is None:
        pytest.skip("no builder of images: apt-get install buildah")
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        pytest.skip("needs root and debootstrap: apt-get install debootstrap")
    if mirror is None:
        pytest.skip(f"this machine's apt has no {containers.SUITE}")
    return builder, mirror


@pytest.fixture(scope="module")
def builder() -> Iterator[str]:
    """What has built the image; it is gone afterwards."""
    builder, mirror = skip_unless_possible()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in containers.use_storage(Path(folder)).items():
            patch.setenv(name, value)
        try:
            containers.import_root(builder, containers.plain_debian(Path(folder), mirror))
            containers.build(builder, Path(folder))
            yield builder
        finally:
            containers.remove_all(builder)


@pytest.fixture(scope="module", params=["engine", "chroot"])
def runner(request: pytest.FixtureRequest, builder: str) -> Runner:
    """What runs containers: an engine as deployments have one, and buildah, which always works."""
    if request.param == "engine":
        return containers.working_engine(builder) or pytest.skip("no engine runs containers on this machine")
    return Chroot() if builder == "buildah" else pytest.skip("needs buildah")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def printed(runner: Runner, *command: str) -> list[str]:
    return containers.output(*runner.run(*command)).splitlines()


class Container:
    """A service in a container, or beside them."""

    def __init__(self, runner: Runner | Checkout, process: "subprocess.Popen[bytes]", port: int) -> None:
        self._runner = runner
        self._process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def wait(self) -> int:
        """The exit code of a container that ends by itself."""
        return self._process.wait(WAIT_S)

    def terminate(self) -> int:
        """The exit code after an orderly stop."""
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
    """One that is ready to score and knows two keys."""
    folder = tmp_path_factory.mktemp("service")
    folder.chmod(0o755)
    keys = folder / "api_keys"
    keys.write_text(f"{KEY}\nmetrics:{METRICS_KEY}\n", "utf-8")
    keys.chmod(0o644)  # as docker/make_secrets.sh does: the container's user is another one
    mounted = ("--volume", f"{keys}:/mnt/api_keys:ro", "--env", "SHOPR1_API_KEY_FILE=/mnt/api_keys")
    with started(runner, folder / "log", *mounted) as container:
        wait_until_ready(container)
        yield container


def wait_until_ready(container: Container) -> None:
    with Client(container.url, timeout_s=WAIT_S) as client:
        client.wait_until_ready(WAIT_S)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What the service of the checkout says."""
    with started(Checkout(), tmp_path_factory.mktemp("checkout") / "log") as checkout:
        wait_until_ready(checkout)
        return rewards(post(checkout.url, None))


def example() -> dict[str, Any]:
    """A request: a prompt of real length with good and bad completions."""
    lines = (containers.ROOT / "examples" / "sessions.jsonl").read_text("utf-8").splitlines()
    session = json.loads(lines[0])
    return {"groups": [{name: session[name] for name in ("prompt", "ground_truth", "completions")}]}


def post(url: str, key: str | None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{url}/score", json=example(), headers=headers, timeout=WAIT_S)


def rewards(answered: httpx.Response) -> list[float]:
    assert answered.status_code == 200, answered.text
    return [reward["reward"] for reward in answered.json()["groups"][0]["rewards"]]


# --- what is in it ----------------------------------------------------------------------------------


def test_it_says_how_it_is_run(builder: str) -> None:
    config = containers.configuration(builder)
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["shopr1", "serve"]
    assert config["StopSignal"] == "SIGTERM"
    assert set(config["ExposedPorts"]) == {"8000/tcp"}
    assert set(config["Volumes"]) == {"/cache"}
    assert config["Labels"]["org.opencontainers.image.version"] == version("shopr1")


def test_how_it_was_built_is_not_in_it(builder: str) -> None:
    environment = " ".join(containers.configuration(builder)["Env"])
    assert "PIP_" not in environment


def test_it_runs_as_a_user_that_is_not_root(runner: Runner) -> None:
    assert printed(runner, "id", "-u") == ["10001"]


def test_that_user_writes_where_it_may_and_nowhere_else(runner: Runner) -> None:
    assert printed(runner, "sh", "-c", "touch /cache/x && rm /cache/x && touch /tmp/x && rm /tmp/x") == []
    look = "find / -xdev -writable ! -type l 2> /dev/null || true"
    assert set(printed(runner, "sh", "-c", look)) <= WRITABLE


def test_it_has_no_tools_to_build_with(runner: Runner) -> None:
    look = f"for tool in {' '.join(BUILD_TOOLS)}; do command -v $tool; done; true"
    assert printed(runner, "sh", "-c", look) == []


def test_it_has_no_caches_and_no_sources(runner: Runner) -> None:
    look = "ls -d /src /root/.cache /etc/pip.conf /opt/pip /var/lib/apt/lists/*Packages* 2> /dev/null; true"
    assert printed(runner, "sh", "-c", look) == []


# --- what it does -----------------------------------------------------------------------------------


def test_it_scores_as_the_checkout_does(expected: list[float], service: Container) -> None:
    assert len(set(expected)) > 3
    assert rewards(post(service.url, KEY)) == pytest.approx(expected, abs=SAME)


def test_it_is_ready_and_says_so_without_a_key(service: Container) -> None:
    assert httpx.get(f"{service.url}/health/ready", timeout=WAIT_S).json() == {"status": "ready"}


def test_its_health_check(service: Container, runner: Runner) -> None:
    for port, code in ((service.port, "0"), (free_port(), "1")):
        look = f"SHOPR1_PORT={port} healthcheck /health/ready; echo $?"
        assert printed(runner, "sh", "-c", look) == [code]


def test_it_asks_for_a_key(service: Container) -> None:
    assert post(service.url, None).status_code == 401
    assert post(service.url, "a-key-that-nobody-has-given").status_code == 401
    assert post(service.url, METRICS_KEY).status_code == 403


def test_prometheus_gets_in_with_its_own_key(service: Container) -> None:
    headers = {"Authorization": f"Bearer {METRICS_KEY}"}
    answered = httpx.get(f"{service.url}/metrics", headers=headers, timeout=WAIT_S)
    assert answered.status_code == 200
    assert "shopr1_policy_info" in answered.text


def test_it_ends_cleanly_when_it_is_told_to(service: Container) -> None:
    # The last test: a stop signal, and exit code 0 within the time that a supervisor gives it.
    assert service.terminate() == 0


def test_it_does_not_start_without_a_key(runner: Runner, tmp_path: Path) -> None:
    with started(runner, tmp_path / "log") as container:
        assert container.wait() == 2
    assert "there are no API keys" in (tmp_path / "log").read_text("utf-8")
