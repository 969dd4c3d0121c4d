"""The tests mirror the source: each module has a test file of its name, in the same folder."""

from pathlib import Path

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
    "service/shopr1_service/engine/fused_head/kernels.py": "service/engine/fused_head/test_reductions.py",
    "service/shopr1_service/http/examples.py": "contract/test_openapi.py",
    "service/shopr1_service/http/openapi.py": "contract/test_openapi.py",
    "service/shopr1_service/updates/updatable_engine.py": "service/http/routes/test_policy.py",
}
"""Modules that need Ray, Triton or an installation, hold data or connect others; where they are tested."""
DECLARATIONS = {
    "service/shopr1_service/engine/attention/options.py",
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


def test_modules_have_test_files() -> None:
    missing = {
        str(module)
        for module in MODULES
        if not module.is_relative_to(TRAINERS) and not (ROOT / mirrored(module)).is_file()
    }
    assert missing == EXEMPT.keys() | DECLARATIONS


def test_test_files_are_named_after_modules() -> None:
    """Several files may test one module: `test_<module>_<aspect>.py`."""
    names = {str(mirrored(module).with_suffix("")) for module in MODULES}
    tests = [str(file.with_suffix("")) for folder in TESTS.values() for file in files(folder, "test_*.py")]
    assert [test for test in tests if not any(f"{test}_".startswith(f"{name}_") for name in names)] == []


def test_exempt_modules_are_tested_elsewhere() -> None:
    assert all((ROOT / "tests" / place).exists() for place in EXEMPT.values())
