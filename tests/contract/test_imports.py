"""Imports: the contracts of pyproject.toml, and the third-party packages that each package may use."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    name: ROOT / folder / name
    for folder, name in [
        ("rewards", "shopr1_rewards"),
        ("service", "shopr1_service"),
        ("clients", "shopr1_client"),
    ]
}
TRAINER_DEPENDENCIES = {
    Path("updates/broadcast.py"): {"torch"},
    Path("updates/process_group.py"): {"torch"},
    Path("trainers/areal_workflow.py"): {"areal"},
    Path("trainers/callback.py"): {"transformers"},
    Path("trainers/ms_swift.py"): {"swift"},
    Path("trainers/openrlhf.py"): {"torch"},
    Path("trainers/skyrl.py"): {"skyrl_gym"},
    Path("trainers/verifiers.py"): {"verifiers"},
    Path("trainers/verl_manager.py"): {"verl"},
}
"""Packages that a trainer's environment has anyway, by the client's modules that import them."""


def imported_names(file: Path) -> Iterator[str]:
    """Top-level names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield str(node.module).partition(".")[0]


def third_party(file: Path) -> set[str]:
    return set(imported_names(file)) - set(sys.stdlib_module_names)


def sources(package: str) -> list[Path]:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert len(files) > 3
    return files


def test_import_contracts() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert completed.returncode == 0, completed.stdout


@pytest.mark.parametrize("file", sources("shopr1_rewards"), ids=lambda file: file.stem)
def test_dependencies_of_the_rewards(file: Path) -> None:
    allowed = {"shopr1_rewards", "pydantic", "pydantic_core"}
    assert third_party(file) <= allowed | ({"torch"} if file.name == "self_certainty.py" else set())


@pytest.mark.parametrize("file", sources("shopr1_client"), ids=lambda file: file.stem)
def test_dependencies_of_the_client(file: Path) -> None:
    allowed = {"shopr1_client", "httpx", "pydantic", "pydantic_core", "stamina"}
    of_trainers = TRAINER_DEPENDENCIES.get(file.relative_to(PACKAGES["shopr1_client"]), set())
    assert third_party(file) <= allowed | of_trainers


@pytest.mark.parametrize("folder", ["rewards", "service", "clients"])
def test_top_level_folders_are_not_packages(folder: str) -> None:
    # Otherwise `import service` would work in the repository and nowhere else.
    assert [path.name for path in (ROOT / folder).iterdir() if not path.name.startswith((".", "__py"))] == [
        path.name for path in PACKAGES.values() if path.parent.name == folder
    ]
