#!/usr/bin/env bash
# polars 2.1.0: read_ndjson rewrites the numbers of a field in which other rows have texts.
#
# Behaviour: where a field has texts and numbers, read_ndjson makes a column of texts, without a warning. The number
# is not written as in the file: it is read as a float first. Zeros at the end, the exponent, and the dot
# of a whole number are lost. Objects and lists become JSON texts.
#
# Seen: {"text": "tea"}, {"text": 3.50}, {"text": 10.0}, {"text": 1e3}, {"text": true}, {"text": [1.50]}
#       -> "tea", "3.5", "10", "1000", "true", "[1.5]"
#
# Why it matters: logs of shopping sessions hold prices as numbers and as texts. "3.50" is what the page showed and
# the shopper typed; after read_ndjson the label is "3.5", the exact match fails for the policy that copies the
# page, and nothing tells the repaired text from an original one. Read such files with json.loads(parse_float=str).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check polars==2.1.0
cd "$dir"
venv/bin/python - <<'EOF'
from pathlib import Path

import polars

values = ['"tea"', "3.50", "10.0", "1e3", "true", "[1.50]"]
Path("sessions.jsonl").write_text("".join(f'{{"text": {value}}}\n' for value in values))
seen = polars.read_ndjson("sessions.jsonl")["text"].to_list()
for value, text in zip(values, seen, strict=True):
    print(f"{value:8} -> {text!r}")
expected = ["tea", "3.5", "10", "1000", "true", "[1.5]"]
if seen != expected:
    raise SystemExit(f"the behaviour has changed: expected {expected}")
EOF
