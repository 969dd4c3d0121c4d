#!/usr/bin/env bash
# Install the wheels of a folder, if there is one, without a network, then run `python -m benchmarks.gpu "$@"`.
# Variables: PYTHON (default python3), WHEELS (default wheels, relative to the repository's root).
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-wheels}
if [ -d "$WHEELS" ]; then
  "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" 'shopr1[service]'
fi
# The checkout's code is measured, whatever the installed wheel contains.
export PYTHONPATH="$PWD/rewards:$PWD/service:$PWD/clients" HF_HUB_OFFLINE=1
exec "$PYTHON" -m benchmarks.gpu "$@"
