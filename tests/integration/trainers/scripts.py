"""Dry runs of the example scripts."""

import os
import subprocess
from pathlib import Path

from tests.integration.trainers.live import ROOT


def arguments(name: str, directory: Path) -> list[str]:
    """The arguments that `examples/<name>` passes to Python, printed by a fake Python."""
    python = directory / "python3"
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o700)
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}
    script = ROOT / "examples" / name
    run = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()
