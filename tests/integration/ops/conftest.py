"""The image, built once for all tests that run it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.ops import containers

BASES = {"debian": containers.plain_debian, "python-slim": containers.python_slim}


def skip_unless_possible() -> tuple[str, str]:
    """A builder and the mirror of Debian."""
    builder, mirror = containers.find_builder(), containers.archive()
    if builder is None:
        pytest.skip("no builder of images: apt-get install buildah")
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        pytest.skip("needs root and debootstrap: apt-get install debootstrap")
    if mirror is None:
        pytest.skip(f"this machine's apt has no {containers.SUITE}")
    return builder, mirror


@pytest.fixture(scope="session", params=BASES)
def builder(request: pytest.FixtureRequest) -> Iterator[str]:
    """The builder of the image from each base. The image is removed afterwards."""
    builder, mirror = skip_unless_possible()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in containers.use_storage(Path(folder)).items():
            patch.setenv(name, value)
        base = BASES[request.param](Path(folder), mirror)
        if base is None:
            pytest.skip("this machine's Python is Debian's own")
        try:
            containers.import_root(builder, base)
            base.unlink()
            containers.build(builder, Path(folder))
            yield builder
        finally:
            containers.remove_all(builder)
