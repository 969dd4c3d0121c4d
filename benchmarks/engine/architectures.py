"""Compare every architecture of the installed transformers with fp64; writes docs/architectures.md.

Each is built tiny, with random weights, in a process of its own: one that crashes or hangs costs its own row.

    python -m benchmarks.engine.architectures [NAME …]
"""

import argparse
import json
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from benchmarks.engine.architecture_row import Row, compare
from benchmarks.engine.tiny_architectures import Architecture, architectures

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
LIMIT_S = 120.0
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["benchmarks.engine.architecture_row"])
INTRODUCTION = """# Architectures

Every language model and image-text model that transformers {version} knows, built tiny with random weights,
and scored as a policy. Written by `make architectures`. Image-text models are given text alone.

- `error` is the worst error of a token's self-certainty against full logits in fp64, in nats, over prompts of
  1, 17 and 150 tokens, kept, grown, evicted, alone and together. `fp32` is that of a plain fp32 forward,
  whose rounding the service cannot avoid.
- *exact*: the error is at most 1e-4 nats, or twice that of plain fp32. *ties*: it is more, and the service
  warns at start that the model's choice of keys breaks ties by the sequence's length. *refused*: the service
  does not start with it, and says why. *failed*: the model fails. *not built*: sizes for a tiny model were
  not found; this says nothing about the service.
- `load` is the time for the check at load, in seconds.

{summary}

| architecture | outcome | forward, head | error | fp32 | load | remarks |
| --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; default: all, which writes the table")
    names = parser.parse_args().names
    chosen = [each for each in architectures() if not names or each.kind in names]
    rows = []
    for architecture in chosen:
        rows.append(run(architecture))
        print(json.dumps(asdict(rows[-1])), flush=True)
    if not names:
        TABLE.write_text(table(rows), "utf-8")


def run(architecture: Architecture, limit_s: float = LIMIT_S) -> Row:
    """The row of one architecture, from a process that may crash or hang."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_work, args=(sender, architecture))
    process.start()
    sender.close()
    failed = Row(architecture.kind, architecture.class_name, architecture.is_image_text, "failed")
    try:
        if receiver.poll(limit_s):
            row: Row = receiver.recv()
            return row
        failed.remarks.append(f"no result after {limit_s:.0f} s")
    except EOFError:
        process.join()
        failed.remarks.append(f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
    return failed


def _work(sender: Connection, architecture: Architecture) -> None:
    """Send the row. The process was forked from one that has imported everything."""
    torch.set_num_threads(1)
    sender.send(compare(architecture))


def table(rows: Sequence[Row]) -> str:
    counts = Counter(row.outcome for row in rows)
    summary = f"{len(rows)} architectures: " + ", ".join(
        f"{num} {name}" for name, num in counts.most_common()
    )
    text = INTRODUCTION.format(version=transformers.__version__, summary=summary + ".")
    return text + "".join(_line(row) for row in sorted(rows, key=lambda row: (row.is_image_text, row.kind)))


def _line(row: Row) -> str:
    path = f"{row.forward}, {row.head}" if row.forward else ""
    name = f"{row.kind} (text of image-text)" if row.is_image_text else row.kind
    cells = [name, row.outcome, path, _number(row.error_nats), _number(row.fp32_nats)]
    cells += ["" if row.load_s is None else f"{row.load_s:.1f}", _remarks(row)]
    return f"| {' | '.join(cells)} |\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _remarks(row: Row) -> str:
    remarks = list(row.remarks)
    if row.eager_sdpa_nats is not None and row.eager_sdpa_nats > 1e-6:
        remarks.append(f"eager and sdpa differ by {row.eager_sdpa_nats:.1e} nats in fp64")
    return "; ".join(remarks).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
