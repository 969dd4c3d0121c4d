#!/usr/bin/env bash
# datasets 5.2.0 (pandas 3.1.1, pyarrow 26.0.1): load_dataset("json") turns texts into datetimes, by their neighbours.
#
# Behaviour: a field whose texts all look like dates in the first block of the file (10 MiB by default) gets the
# feature type timestamp[s]. The text is lost: "2026-05-01" and "2026-05-01T00:00" are the same value afterwards.
# A single text of another kind in the first block keeps all of them as they are. In a later block, the same text
# is an error for the whole file. pandas and json.loads keep the texts.
#
# Seen: ["2026-05-01", "2026-05-01T00:00"] -> two equal datetime.datetime(2026, 5, 1, 0, 0)
#       ["2026-05-01", "2026-05-01T00:00", "tea"] -> the texts of the file
#       ["2026-05-01", "tea"] in blocks of their own -> DatasetGenerationError
#
# Why it matters: a text that a shopper typed (a delivery date, a birthday) is a label of the RL data set, and is
# compared with the policy's text. Its type depends on the other rows, so a small split of the file trains with
# other labels than the whole file, and str(datetime) gives a text that nobody typed. Declare `features=`.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check datasets==5.2.0 pandas==3.1.1 pyarrow==26.0.1
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
import json
from datetime import datetime
from pathlib import Path

from datasets import disable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError

disable_progress_bars()


def loaded(name, texts, **options):
    Path(name).write_text("".join(json.dumps({"x": text}) + "\n" for text in texts))
    try:
        seen = [row["x"] for row in load_dataset("json", data_files=name, split="train", **options)]
    except DatasetGenerationError as error:
        seen = type(error)
    print(texts[:3], "->", seen if isinstance(seen, type) else seen[:3])
    return seen


def check(seen, expected):
    if seen != expected:
        raise SystemExit(f"the behaviour has changed: expected {expected}")


dates = ["2026-05-01", "2026-05-01T00:00"]
check(loaded("dates.jsonl", dates), [datetime(2026, 5, 1)] * 2)
check(loaded("all.jsonl", [*dates, "tea"]), [*dates, "tea"])
check(loaded("blocks.jsonl", ["2026-05-01", "tea"], chunksize=10), DatasetGenerationError)
EOF
