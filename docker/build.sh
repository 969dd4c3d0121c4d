#!/usr/bin/env bash
# Builds the image with docker, podman or buildah, whichever is there. From the environment:
#
#   IMAGE                  name and tag of the result (shopr1:latest)
#   BASE_IMAGE, EXTRAS     see docker/Dockerfile
#   WITH_EMBEDDED_POLICY   0 leaves out the small policy that is served when none is named
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL   where packages come from; they are not in the image
#   PIP_CONF               a pip.conf for the build, for all else and for passwords; it is in no layer
#   BUILDER                docker, podman or buildah; default: the first of them that is there
#   BUILD_FLAGS            more flags for the builder, such as `--volume /srv/wheels:/srv/wheels:ro` (not docker)
#   BUILDAH_ISOLATION      of podman and buildah; chroot where containers cannot be run
set -euo pipefail
cd "$(dirname "$0")/.."

find_builder() {
  # The docker command is often there without an engine behind it.
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
  # Without a runtime or namespaces of one's own, a change of root is isolation enough for a build.
  if ! { command -v crun || command -v runc; } > /dev/null || ! unshare --user true 2> /dev/null; then
    export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}
  fi
fi

read -r -a more <<< "${BUILD_FLAGS:-}"
exec "$builder" build "${flags[@]}" "${more[@]}" .
