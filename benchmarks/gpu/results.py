"""Result rows of a GPU run, their CSV, and the time budget."""

import csv
import time
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import torch
import transformers

from benchmarks.report import device_name


class Outcome(StrEnum):
    """Outcome of a row. A run with a `FAIL` fails."""

    PASS = "pass"
    FAIL = "fail"
    MEASURED = "measured"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Row:
    """One check or measurement.

    Attributes:
        time_s: median duration.
        peak_gib: peak memory above the memory in use before, in GiB.
        peak_flop_share: FLOPs that the method needs, per second, as a share of the device's peak.
        rounds: timed runs.
        error_nats, tolerance_nats: mean absolute error of self-certainty per token, and its limit.
    """

    section: str
    workload: str
    method: str
    dtype: str
    outcome: Outcome
    time_s: float | None = None
    peak_gib: float | None = None
    peak_flop_share: float | None = None
    rounds: int | None = None
    error_nats: float | None = None
    tolerance_nats: float | None = None
    note: str = ""


HEADER = ("date", "device", "torch", "transformers", *(field.name for field in fields(Row)))


class Results:
    """Rows of one run, printed as they are added."""

    def __init__(self, device: torch.device) -> None:
        self.rows: list[Row] = []
        self._head = (
            datetime.now(UTC).date().isoformat(),
            device_name(device),
            torch.__version__,
            transformers.__version__,
        )
        print(", ".join(self._head), flush=True)

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.outcome is Outcome.FAIL]

    def add(self, row: Row) -> None:
        """Append a row and print it."""
        self.rows.append(row)
        numbers = [
            _shown("{:.4g} s", row.time_s),
            _shown("{:.2f} GiB", row.peak_gib),
            _shown("{:.0%} of peak", row.peak_flop_share),
            _shown("{} rounds", row.rounds),
            _shown("error {:.2g} nats", row.error_nats),
            _shown("(limit {:g})", row.tolerance_nats),
            row.note,
        ]
        title = f"{row.outcome:<8} {row.workload:<16} {row.method:<16} {row.dtype:<9}"
        print(title, " ".join(filter(None, numbers)), flush=True)

    def write(self, path: Path) -> None:
        """Write all rows as CSV."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEADER)
            writer.writerows([*self._head, *map(_cell, astuple(row))] for row in self.rows)
        print(f"wrote {path}")


class Budget:
    """Time that is left of a run."""

    def __init__(self, total_s: float) -> None:
        self._deadline_s = time.perf_counter() + total_s

    @property
    def remaining_s(self) -> float:
        return self._deadline_s - time.perf_counter()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else value
