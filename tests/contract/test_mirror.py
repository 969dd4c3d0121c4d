"""The tests mirror the source: each module has a test file of its name, in the same folder."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = {
    Path("rewards/shopr1_rewards"): Path("tests/rewards"),
    Path("clients/shopr1_client"): Path("tests/clients"),
    Path("service/shopr1_service"): Path("tests/service"),
}
TRAINERS = Path("clients/shopr1_client/trainers")
"""Its modules are tested beside the real trainers, in tests/integration/trainers."""
EXEMPT = {
    "service/shopr1_service/__main__.py": "contract/test_bare_install.py",
    "service/shopr1_service/cluster/application.py": "integration/ray",
    "service/shopr1_service/cluster/ray_router.py": "integration/ray",
    "service/shopr1_service/cluster/remote_engines.py": "integration/ray/test_remote_engines.py",
    "service/shopr1_service/dialects/examples.py": "contract/test_openapi.py",
    "service/shopr1_service/dialects/results.py": "integration/api/test_every_dialect.py",
    "service/shopr1_service/http/examples.py": "contract/test_openapi.py",
    "service/shopr1_service/http/openapi.py": "contract/test_openapi.py",
    "service/shopr1_service/updates/updatable_engine.py": "service/http/routes/test_policy.py",
}
"""Modules that need Ray or an installation, hold data, or only connect others, and where they are tested."""
DECLARATIONS = {
    "service/shopr1_service/errors.py",
    "service/shopr1_service/policy/base.py",
}
"""Modules of constants, protocols and classes without behaviour."""


def mirrored(module: Path) -> Path:
    """The test file of a module; paths are relative to the repository."""
    [(source, tests)] = [pair for pair in TESTS.items() if module.is_relative_to(pair[0])]
    return tests / module.relative_to(source).with_name(f"test_{module.stem}.py")


def files(folder: Path, pattern: str) -> list[Path]:
    found = [path.relative_to(ROOT) for path in sorted((ROOT / folder).rglob(pattern))]
    assert found
    return found


MODULES = [module for source in TESTS for module in files(source, "*.py") if module.name != "__init__.py"]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_has_its_test_file(module: Path) -> None:
    is_exempt = str(module) in EXEMPT.keys() | DECLARATIONS
    if not module.is_relative_to(TRAINERS):
        assert (ROOT / mirrored(module)).is_file() is not is_exempt


@pytest.mark.parametrize("file", [f for tests in TESTS.values() for f in files(tests, "test_*.py")], ids=str)
def test_a_test_file_is_named_after_a_module(file: Path) -> None:
    """Several files may test one module: `test_<module>_<aspect>.py`."""
    names = {mirrored(module).stem for module in MODULES if mirrored(module).parent == file.parent}
    assert any(file.stem == name or file.stem.startswith(f"{name}_") for name in names)


def test_exemptions_are_current() -> None:
    assert EXEMPT.keys() | DECLARATIONS <= {str(module) for module in MODULES}
    assert all((ROOT / "tests" / place).exists() for place in EXEMPT.values())
