"""A live service as a trainer meets it: `shopr1 serve` on the embedded policy, in an environment of its own.

Not part of `make test`. `make test-trainers` runs each file in an environment with its trainer, from PyPI,
and this project's base install; `make test-trainer-trl` one of them.
"""

import subprocess
import tempfile
from collections.abc import Iterator

import pytest

from shopr1_client import Client
from tests.trainers.live import API_KEY, Live, command, free_port

READY_TIMEOUT_S = 300.0


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A service that is ready to score."""
    port = free_port()
    service = Live(f"http://127.0.0.1:{port}")
    environment = {"SHOPR1_API_KEYS": API_KEY, "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command(port), env=environment, stderr=log) as process,
    ):
        try:
            with Client(service.url) as client:
                client.wait_until_ready(READY_TIMEOUT_S)
            yield service
        finally:
            process.terminate()


@pytest.fixture
def environment(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variables that tell a shim where the service is."""
    monkeypatch.setenv("SHOPR1_CLIENT_URL", live.url)
    monkeypatch.setenv("SHOPR1_CLIENT_API_KEY", API_KEY)
