"""Both servers with the same settings: `shopr1 serve`, and the Ray Serve application with two replicas."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

KEYS = {"score": "score-key-0123456789", "admin": "admin-key-0123456789", "metrics": "metrics-key-012345"}
SETTINGS = {
    "dtype": "float32",
    "device": "cpu",
    "deterministic": True,  # so that the numbers of both servers can be equal
    "max_body_bytes": 200_000,
    "receive_timeout_s": 20.0,
}
NUM_REPLICAS = 2
START_S = 480.0
_ROOT = Path(__file__).parents[3]
_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
"""With tokens, only the process that has started Ray could deploy a configuration."""


@pytest.fixture(scope="module")
def policy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory where both servers read checkpoints and store uploads."""
    return tmp_path_factory.mktemp("policies")


@pytest.fixture(scope="module")
def settings(policy_root: Path) -> dict[str, Any]:
    """Settings of both servers."""
    return {**SETTINGS, "policy_roots": str(policy_root), "staging_dir": str(policy_root)}


@pytest.fixture(scope="module")
def single(settings: dict[str, Any]) -> Iterator[str]:
    """URL of `shopr1 serve`."""
    port = _free_port()
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "shopr1_service", "serve", "--port", str(port), *sets]
    with _running(command, f"http://127.0.0.1:{port}") as url:
        yield url


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Iterator[str]:
    """URL of the shipped application with two replicas."""
    with serving(tmp_path_factory.mktemp("ray"), {"num_replicas": NUM_REPLICAS, **settings}) as url:
        yield url


@contextlib.contextmanager
def serving(folder: Path, args: Mapping[str, Any]) -> Iterator[str]:
    """Run the shipped application on a new Ray cluster, and yield its URL.

    Args:
        args: the application's arguments, in addition to the shipped ones.
    """
    port = _free_port()
    file = configuration(folder / "serve.yaml", port, args)
    with _running([_serve(), "run", str(file)], f"http://127.0.0.1:{port}") as url:
        yield url


def configuration(file: Path, port: int, args: Mapping[str, Any]) -> Path:
    """Write the shipped configuration with other arguments of the application."""
    config = yaml.safe_load((_ROOT / "docker/ray/serve.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= args
    file.write_text(yaml.safe_dump(config))
    return file


def deploy(file: Path) -> None:
    """Deploy another configuration. Returns before it is running."""
    subprocess.run([_serve(), "deploy", str(file)], cwd=_ROOT, env={**os.environ, **_RAY}, check=True)


def _serve() -> str:
    serve = shutil.which("serve", path=str(Path(sys.executable).parent))
    assert serve is not None
    return serve


def client_of(url: str, scope: str | None = "score") -> httpx.Client:
    headers = {"Authorization": f"Bearer {KEYS[scope]}"} if scope else {}
    return httpx.Client(base_url=url, headers=headers, timeout=120.0)


def replica_pids() -> list[int]:
    """Process ids of the engines, found by the names that Ray gives them."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if "ServeReplica:shopr1:Engines" in _command(pid)]


def proxy_pids() -> list[int]:
    """Process ids of the HTTP proxy."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if "ProxyActor" in _command(pid)]


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextlib.contextmanager
def _running(command: list[str], url: str) -> Iterator[str]:
    keys = ",".join(f"{scope}:{key}" for scope, key in KEYS.items())
    environment = {
        **_RAY,
        "SHOPR1_API_KEYS": keys,
        "OMP_NUM_THREADS": "1",  # as Ray sets it for an engine with one CPU: the order of sums depends on it
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(command, cwd=_ROOT, env={**os.environ, **environment})
    try:
        _wait_until_ready(process, url)
        yield url
    finally:
        process.send_signal(signal.SIGINT if "run" in command else signal.SIGTERM)
        process.wait(60)


def _wait_until_ready(process: "subprocess.Popen[Any]", url: str) -> None:
    give_up_at = time.monotonic() + START_S
    while time.monotonic() < give_up_at:
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/ready").is_success:
                return
        time.sleep(0.2)  # nothing signals that a port is open
    raise AssertionError("the server does not become ready")
