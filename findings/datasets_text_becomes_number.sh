#!/usr/bin/env bash
# datasets 5.2.0 (pandas 3.1.1, pyarrow 26.0.1): load_dataset("json") turns texts into numbers, objects and nulls.
#
# Behaviour: if a field has values of several types in a file, load_dataset gives it the feature type Json. This
# type takes every text that happens to be valid JSON as JSON, and not as the text that it is. Other rows decide
# about a row: "42" stays a text in a file of texts, and is a number as soon as one row of the file has a number,
# a list or an object there. No warning.
#
# Seen, in a file whose last row has the number 2.5:
#     "42" -> 42    "007" -> 7    "3.50" -> 3.5    "null" -> None    "true" -> True    "\"tea\"" -> tea    "tea" -> tea
# and in a file of chats in which one message has parts, and the others have texts:
#     {"content": "{\"type\": \"terminate\"}"} -> {"content": {"type": "terminate"}}
#
# Why it matters: the answer of a shopping agent is often JSON in a text, and shoppers type prices and quotation
# marks. One image in a data set of messages makes objects of such answers, in all rows: chat templates and reward
# functions get an object where they expect a text. A label "007" or "\"tea\"" is another label. Declare
# `features=`, or read the file with json.loads and write the field as one JSON text in every row.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check datasets==5.2.0 pandas==3.1.1 pyarrow==26.0.1
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
import json
from pathlib import Path

from datasets import disable_progress_bars, load_dataset

disable_progress_bars()


def loaded(name, values):
    Path(name).write_text("".join(json.dumps({"x": value}) + "\n" for value in values))
    return [row["x"] for row in load_dataset("json", data_files=name, split="train")]


def check(seen, expected):
    print(seen)
    if repr(seen) != repr(expected):
        raise SystemExit(f"the behaviour has changed: expected {expected}")


texts = ["42", "007", "3.50", "null", "true", '"tea"', "tea"]
check(loaded("texts.jsonl", texts), texts)
check(loaded("mixed.jsonl", [*texts, 2.5]), [42, 7, 3.5, None, True, "tea", "tea", 2.5])

answer = {"role": "assistant", "content": '{"type": "terminate"}'}
parts = {"role": "user", "content": [{"type": "text", "text": "page"}]}
check(loaded("chats.jsonl", [[answer], [answer]]), [[answer], [answer]])
as_object = {"role": "assistant", "content": {"type": "terminate"}}
check(loaded("parts.jsonl", [[answer], [parts]]), [[as_object], [parts]])
EOF
