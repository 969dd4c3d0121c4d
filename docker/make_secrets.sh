#!/usr/bin/env bash
# Makes the secrets that docker/compose.yaml reads, in docker/secrets or the folder that is given. What is
# already there stays as it is.
set -euo pipefail

folder=${1:-$(dirname "$0")/secrets}

new_key() {
  od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n'
  echo
}

# The folder keeps this machine's other users out. The files must be readable: every container reads its own
# as a user of its own.
mkdir -p "$folder"
chmod 700 "$folder"
cd "$folder"
umask 022

[ -e metrics_key ] || new_key > metrics_key
[ -e grafana_password ] || new_key > grafana_password
[ -e api_keys ] || { new_key && sed 's/^/metrics:/' metrics_key; } > api_keys

if ! grep --quiet --line-regexp --fixed-strings --file=<(sed 's/^/metrics:/' metrics_key) api_keys; then
  echo "Prometheus will be refused: to $folder/api_keys add the line \`metrics:\` with the key of metrics_key" >&2
  exit 1
fi
