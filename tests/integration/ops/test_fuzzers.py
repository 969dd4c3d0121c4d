"""Coverage-guided fuzzing of all parsers of untrusted bytes. `FUZZ_SECONDS=3600` takes hours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TARGETS = ("completion", "bodies", "labels", "api_keys", "safetensors_header", "uploads")
SECONDS = int(os.environ.get("FUZZ_SECONDS", "15"))
STARTING_S = 120


@pytest.mark.timeout(SECONDS + 2 * STARTING_S)
@pytest.mark.parametrize("target", TARGETS)
def test_no_input_fails(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    completed = subprocess.run(
        [
            sys.executable,
            "-m",
            f"tests.integration.ops.fuzz.{target}",
            f"-max_total_time={SECONDS}",
            "-print_final_stats=1",
        ],
        cwd=HERE.parents[2],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",
        timeout=SECONDS + STARTING_S,
        check=False,
    )
    # The output ends with the exception and its input.
    assert completed.returncode == 0, completed.stdout[-4000:] + completed.stderr[-4000:]
    num_runs = re.search(r"number_of_executed_units: *(\d+)", completed.stderr)
    covered = re.findall(r"cov: (\d+)", completed.stderr)
    assert num_runs is not None, completed.stderr[-4000:]
    with capsys.disabled():
        sys.stdout.write(f"\n{target}: {num_runs[1]} inputs, {covered[-1]} branches\n")
    assert int(num_runs[1]) > 100


def test_every_target_is_run() -> None:
    files = {path.stem for path in (HERE / "fuzz").glob("*.py")}
    assert files == {*TARGETS, "__init__", "harness"}
