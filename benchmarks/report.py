"""Result rows: printed as they are measured, written as CSV."""

import csv
import platform
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import transformers

HEADER = ("device", "torch", "transformers", "dtype", "workload", "quantity", "value", "unit")
FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        unit: `x` for a ratio of times or sizes; empty for a share.
    """

    workload: str
    quantity: str
    value: float
    unit: str


class Report:
    """Rows of one run."""

    def __init__(self, device: torch.device, dtype: str) -> None:
        self.device_name = device_name(device)
        self.dtype = dtype
        self.rows: list[Row] = []
        print(f"{self.device_name}, torch {torch.__version__}, {dtype}", flush=True)

    def add(self, workload: object, quantity: str, value: float, unit: str) -> None:
        """Append a row and print it."""
        row = Row(str(workload), quantity, value, unit)
        self.rows.append(row)
        print(f"{row.workload:<24} {quantity:<32} {value:12.3f} {unit}", flush=True)

    def write(self, path: Path) -> None:
        """Write all rows as CSV."""
        head = (self.device_name, torch.__version__, transformers.__version__, self.dtype)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEADER)
            writer.writerows((*head, *_cells(row)) for row in self.rows)
        print(f"wrote {path}")


def _cells(row: Row) -> Sequence[str]:
    workload, quantity, value, unit = astuple(row)
    return workload, quantity, f"{float(f'{value:.4g}'):g}", unit


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with its threads and its bfloat16 instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    extras = [flag for flag in FAST_BFLOAT16 if flag in flags]
    return " ".join([f"{cpu} x{torch.get_num_threads()}", *extras])
