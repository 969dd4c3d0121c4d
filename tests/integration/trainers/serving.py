"""Services with other settings than that of the fixture `live`."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from shopr1_client import Client
from tests.integration.trainers.live import API_KEY, Live, command, free_port

READY_TIMEOUT_S = 300.0


@contextmanager
def serving(**settings: str) -> Iterator[Live]:
    """Run a service until the block ends. Settings are named without `SHOPR1_`."""
    port = free_port()
    environment = {"SHOPR1_API_KEYS": API_KEY, "HF_HUB_OFFLINE": "1", "SHOPR1_DTYPE": "float32"}
    environment |= {f"SHOPR1_{name.upper()}": value for name, value in settings.items()}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command(port), env=environment, stderr=log) as process,
    ):
        try:
            with Client(f"http://127.0.0.1:{port}") as client:
                client.wait_until_ready(READY_TIMEOUT_S)
            yield Live(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
