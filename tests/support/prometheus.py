"""A real Prometheus server, and promtool."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

from tests.support.http import WAIT_S

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docker" / "prometheus" / "prometheus.yml"
RULES = ROOT / "docker" / "prometheus" / "alerts.yml"
RULES_TEST = ROOT / "docker" / "prometheus" / "alerts_test.yml"
_POLL_S = 0.05

_T = TypeVar("_T")


def binary(name: str) -> str:
    path = shutil.which(name)
    assert path, f"no {name} on PATH; `make test-ops` downloads it from Debian's package prometheus"
    return path


def promtool(*arguments: str | Path, given: str = "") -> str:
    """Output of promtool, which must succeed."""
    done = subprocess.run(
        [binary("promtool"), *arguments], input=given, capture_output=True, text=True, timeout=5 * WAIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def until(get: Callable[[], _T | None], what: str, wait_s: float = WAIT_S) -> _T:
    """Poll `get` until it returns a value, and return it."""
    deadline_s = time.monotonic() + wait_s
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.TransportError):
            if (found := get()) is not None:
                return found
        time.sleep(_POLL_S)
    raise AssertionError(f"{what}: not within {wait_s:g} s")


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus server."""

    client: httpx.Client

    def get(self, path: str, **parameters: str) -> Any:
        response = self.client.get(f"/api/v1/{path}", params=parameters)
        assert response.is_success, response.text
        return response.json()["data"]

    def values(self, expr: str) -> list[float]:
        return [float(sample["value"][1]) for sample in self.get("query", query=expr)["result"]]

    def labels(self, expr: str) -> list[dict[str, str]]:
        return [dict(sample["metric"]) for sample in self.get("query", query=expr)["result"]]


@contextlib.contextmanager
def prometheus(
    directory: Path, *targets: str, api_key: str = "none", rules: Path = RULES
) -> Iterator[Prometheus]:
    """Run Prometheus with the shipped configuration, except targets, key and intervals.

    Args:
        directory: directory of its data and its log.
        targets: host and port of each service.
        rules: other rules than the shipped ones.
    """
    key, config = directory / "key", directory / "prometheus.yml"
    key.write_text(api_key, "utf-8")
    settings = yaml.safe_load(CONFIG.read_text("utf-8"))
    [job] = settings["scrape_configs"]
    job["authorization"]["credentials_file"] = str(key)
    job["static_configs"][0]["targets"] = list(targets)
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    settings["rule_files"] = [str(rules)]
    config.write_text(yaml.safe_dump(settings), "utf-8")
    promtool("check", "config", config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    command = [binary("prometheus"), f"--config.file={config}", f"--web.listen-address={address}"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--storage.tsdb.path={directory / 'data'}"], stderr=log)
        try:
            with httpx.Client(base_url=f"http://{address}", timeout=WAIT_S) as client:
                until(lambda: client.get("/-/ready").is_success or None, "Prometheus is ready")
                yield Prometheus(client)
        finally:
            process.terminate()
            process.wait(WAIT_S)
