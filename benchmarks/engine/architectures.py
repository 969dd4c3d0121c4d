"""Compare every architecture of the installed transformers with fp64; writes docs/architectures.md.

Each is built tiny, with random weights, in a process of its own: one that crashes or hangs costs its own row.

    python -m benchmarks.engine.architectures [NAME …]

With names only their rows are computed, and replaced in the table.
"""

import argparse
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from benchmarks.engine.architecture_row import Row, compare
from benchmarks.engine.tiny_architectures import Architecture, architectures

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
LIMIT_S = 120.0
IMAGE_TEXT = "(text of image-text)"
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["benchmarks.engine.architecture_row"])
INTRODUCTION = """# Architectures

Every language model and image-text model that transformers {version} knows, built tiny with random weights,
and scored as a policy. Written by `make architectures`; `python -m benchmarks.engine.architectures NAME …`
renews single rows. Image-text models are given text alone.

- `error` is the worst error of a token's self-certainty against full logits in fp64, in nats, over prompts of
  1, 17 and 150 tokens, kept, grown, evicted, alone and together. `fp32` is that of a plain fp32 forward,
  whose rounding the service cannot avoid. Two models mix fp32 into fp64 and fail (inkling2, xglm): there
  all that their code computes in fp32 is computed in fp64.
- *exact*: the error is at most 1e-4 nats, or twice that of plain fp32. *ties*: it is more, and the service
  warns at start that the model's choice of keys breaks ties by the sequence's length. *refused*: the service
  does not start with it, and says why. *failed*: no result, and why. *not built*: transformers cannot build
  it here, and why; this says nothing about the service.
- `load` is the time for the check at load, in seconds.

{summary}

| architecture | outcome | forward, head | error | fp32 | load | remarks |
| --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; default: all")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="limit of a row, in seconds")
    options = parser.parse_args()
    lines = table_lines(TABLE.read_text("utf-8")) if options.names else {}
    for architecture in architectures():
        if options.names and architecture.kind not in options.names:
            continue
        row = run(architecture, options.limit_s)
        print(json.dumps(asdict(row)), flush=True)
        lines[_name(row)] = _line(row)
        if options.names:
            TABLE.write_text(table(lines.values()), "utf-8")
    TABLE.write_text(table(lines.values()), "utf-8")


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


def table(lines: Iterable[str]) -> str:
    """The page with these rows of its table."""
    counts = Counter(_outcome(line) for line in lines)
    summary = f"{counts.total()} architectures: " + ", ".join(
        f"{num} {name}" for name, num in counts.most_common()
    )
    text = INTRODUCTION.format(version=transformers.__version__, summary=summary + ".")
    return text + "".join(sorted(lines, key=lambda line: (IMAGE_TEXT in line, line)))


def table_lines(text: str) -> dict[str, str]:
    """The rows of the table of a page, by the architecture's name."""
    _, _, rows = text.partition("| --- |")
    lines = rows.splitlines(keepends=True)[1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def _outcome(line: str) -> str:
    return line.split(" | ")[1]


def _name(row: Row) -> str:
    return f"{row.kind} {IMAGE_TEXT}" if row.is_image_text else row.kind


def _line(row: Row) -> str:
    path = f"{row.forward}, {row.head}" if row.forward else ""
    cells = [_name(row), row.outcome, path, _number(row.error_nats), _number(row.fp32_nats)]
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
