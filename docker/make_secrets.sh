#!/usr/bin/env bash
# Creates the secrets that docker/compose.yaml reads, in docker/secrets or the given folder. Existing secrets are
# kept.
set -euo pipefail

folder=${1:-$(dirname "$0")/secrets}

new_key() {
  od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n'
  echo
}

# The folder is closed to other users of this machine. The files must be world-readable, because each container
# reads its secret as a different user.
mkdir -p "$folder"
chmod 700 "$folder"
cd "$folder"
umask 022

[ -e metrics_key ] || new_key > metrics_key
[ -e grafana_password ] || new_key > grafana_password
[ -e api_keys ] || { new_key && sed 's/^/metrics:/' metrics_key; } > api_keys

if ! grep --quiet --line-regexp --fixed-strings --file=<(sed 's/^/metrics:/' metrics_key) api_keys; then
  echo "Prometheus will be refused. In $folder/api_keys, add the line \`metrics:\` with the key of metrics_key" >&2
  exit 1
fi
