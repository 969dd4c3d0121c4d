"""The smoke run of the GPU benchmark, in process, on the CPU."""

import csv
import itertools
import re
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import NO_DEVICE, main
from benchmarks.gpu.correctness import STRATEGIES, TOLERANCE_NATS
from benchmarks.gpu.models import FAMILIES
from benchmarks.gpu.speed import TINY_SHAPES

COLUMNS = [
    *("date", "device", "torch", "transformers", "section", "workload", "method", "dtype", "outcome"),
    *("time_s", "peak_gib", "peak_flop_share", "rounds", "error_nats", "tolerance_nats", "note"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    output = tmp_path_factory.mktemp("gpu") / "results.csv"
    assert main(["--tiny", "--output", str(output)]) == 0
    return read(output)


def read(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        reader = csv.DictReader(lines)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def section(rows: list[dict[str, str]], name: str) -> list[dict[str, str]]:
    return [row for row in rows if row["section"] == name]


def test_every_row_names_the_machine(rows: list[dict[str, str]]) -> None:
    assert all(row[name] for row in rows for name in COLUMNS[:4])
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert {row["outcome"] for row in rows} == {"pass", "measured"}


def test_every_strategy_is_checked_with_every_family(rows: list[dict[str, str]]) -> None:
    checked = [(row["workload"], row["dtype"], row["method"]) for row in section(rows, "correctness")]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE_NATS]
    assert checked == list(itertools.product(FAMILIES, dtypes, [*STRATEGIES, "self-check"]))


def test_numbers_agree_with_fp64(rows: list[dict[str, str]]) -> None:
    for row in section(rows, "correctness"):
        if row["error_nats"]:
            assert float(row["error_nats"]) <= float(row["tolerance_nats"]) < 0.1
        else:
            assert row["note"].startswith("chose shared_prefix")


def test_speed_has_every_method_at_every_shape(rows: list[dict[str, str]]) -> None:
    machine, *table = section(rows, "speed")
    assert machine["method"] == "matmul"
    methods = ["engine (shared_prefix)", "logits_to_keep", "full logits"]
    expected = list(itertools.product(map(str, TINY_SHAPES), methods))
    assert [(row["workload"], row["method"]) for row in table] == expected
    assert all(float(row["time_s"]) > 0 and row["peak_gib"] and int(row["rounds"]) >= 1 for row in table)
    errors = [float(row["error_nats"]) for row in table if not row["method"].startswith("engine")]
    assert max(errors) < 1e-5


def test_notes_compare_with_a_matrix_product_and_with_the_engine(rows: list[dict[str, str]]) -> None:
    _, *table = section(rows, "speed")
    for row in table:
        if row["method"].startswith("engine"):
            assert re.fullmatch(r"\S+ of matmul, head linear, attention cpu_flash", row["note"])
        else:
            assert re.fullmatch(r"\S+ x the engine's time", row["note"])


def test_variants_are_compared_with_fp64(rows: list[dict[str, str]]) -> None:
    assert [(row["method"], row["note"]) for row in section(rows, "head")] == [("linear", "chosen")]
    found = [(row["workload"], row["method"], row["note"]) for row in section(rows, "attention")]
    kernels = [("cpu_flash", "chosen"), ("open", "")]
    assert found == [(place, *kernel) for place in ("own 256", "prefix 256") for kernel in kernels]
    for row in section(rows, "head") + section(rows, "attention"):
        assert float(row["time_s"]) > 0
        assert float(row["error_nats"]) < 1e-4


def test_waits_are_compared(rows: list[dict[str, str]]) -> None:
    [row] = section(rows, "waits")
    assert row["note"] == "0 with 2 layers, 0 with 4 layers"


def test_updates_are_timed(rows: list[dict[str, str]]) -> None:
    outcomes = {row["method"]: row["outcome"] for row in section(rows, "update")}
    assert outcomes == {"save_file": "measured", "first": "pass", "next": "pass"}


def test_without_time_everything_is_skipped(tmp_path: Path) -> None:
    assert main(["--tiny", "--budget-s", "0", "--output", str(tmp_path / "results.csv")]) == 0
    rows = read(tmp_path / "results.csv")
    assert {row["outcome"] for row in rows} == {"skipped"}
    assert {row["section"] for row in rows} == {"correctness", "head", "speed", "update"}
    assert all(row["note"] for row in rows)


def test_without_a_device_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--output", str(tmp_path / "results.csv")]) == 2
    assert capsys.readouterr().err == f"{NO_DEVICE}\n"
    assert not list(tmp_path.iterdir())
