"""The digest of the software changes with a library's version and with the service's code."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shopr1_service.policy import software
from shopr1_service.policy.software import software_digest


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    software_digest.cache_clear()
    yield
    software_digest.cache_clear()


def digest() -> str:
    software_digest.cache_clear()
    return software_digest()


def test_it_depends_on_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest()
    assert digest() == before
    for library in ("torch", "transformers", "tokenizers", "safetensors", "gguf"):
        with monkeypatch.context() as patch:
            patch.setattr(software, "version", lambda name, library=library: "0" if name == library else "1")
            assert digest() != before


def test_it_depends_on_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(software, "_PACKAGE", tmp_path)
    file = tmp_path / "engine" / "forward" / "base.py"
    file.parent.mkdir(parents=True)
    file.write_text("a = 1")
    before = digest()
    file.write_text("a = 2")
    assert digest() != before
    file.write_text("a = 1")
    assert digest() == before
    file.rename(file.with_name("other.py"))
    assert digest() != before
