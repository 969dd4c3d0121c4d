#!/usr/bin/env bash
# Builds the image with docker, podman or buildah. Environment variables:
#
#   IMAGE                  name and tag of the result (shopr1:latest)
#   BASE_IMAGE, EXTRAS     see docker/Dockerfile
#   WITH_EMBEDDED_POLICY   0 omits the small default policy
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL   package indexes; the image does not record them
#   PIP_CONF               a pip.conf for the build, for other options and passwords; no layer contains it
#   BUILDER                docker, podman or buildah; default: the first that is installed
#   BUILD_FLAGS            extra flags for the builder, such as `--volume /srv/wheels:/srv/wheels:ro` (not docker)
#   BUILDAH_ISOLATION      isolation of podman and buildah; chroot if containers cannot run
set -euo pipefail
cd "$(dirname "$0")/.."

find_builder() {
  # The docker command is often installed without a running engine.
  if docker version > /dev/null 2>&1; then echo docker
  elif command -v podman > /dev/null; then echo podman
  elif command -v buildah > /dev/null; then echo buildah
  else
    echo "no docker engine, no podman, no buildah; on Debian: apt-get install buildah" >&2
    return 1
  fi
}

builder=${BUILDER:-$(find_builder)}
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git describe --always --abbrev=40 --exclude '*' --dirty 2> /dev/null || echo unknown)

flags=(--file docker/Dockerfile --tag "${IMAGE:-shopr1:latest}")
flags+=(--build-arg "VERSION=$version" --build-arg "REVISION=$revision")
for name in BASE_IMAGE EXTRAS WITH_EMBEDDED_POLICY PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do
  if [ -n "${!name:-}" ]; then flags+=(--build-arg "$name=${!name}"); fi
done
if [ -n "${PIP_CONF:-}" ]; then flags+=(--secret "id=pip,src=$PIP_CONF"); fi

if [ "$builder" != docker ]; then
  flags+=(--format docker --layers) # the OCI format has no health check
  # Without a container runtime or user namespaces, chroot isolates a build well enough.
  if ! { command -v crun || command -v runc; } > /dev/null || ! unshare --user true 2> /dev/null; then
    export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}
  fi
fi

read -r -a more <<< "${BUILD_FLAGS:-}"
exec "$builder" build "${flags[@]}" "${more[@]}" .
