"""The `shopr1` command in a test: in this process, or in its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.http import WAIT_S, answer, group


class Ended:
    """How the command ended and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        _progress, found, message = " ".join(err.split()).rpartition("error: ")
        self.error = message if found else None


Run = Callable[..., Ended]


def run_process(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shopr1_service", *arguments]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=WAIT_S, check=False, **kwargs
    )


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def groups(num: int) -> list[dict[str, Any]]:
    return [group(answer(), id=str(i)) for i in range(num)]
