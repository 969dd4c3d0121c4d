"""What a trainer installs: no torch, no web framework, and imports that point one way."""

import ast
import re
import subprocess
import sys
import venv
import zipfile
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
OURS = set(PACKAGES)
OF_TRAINERS = {
    Path("broadcast.py"): {"torch"},
    Path("transfer_group.py"): {"torch"},
    Path("trainers/areal_workflow.py"): {"areal"},
    Path("trainers/callback.py"): {"transformers"},
    Path("trainers/ms_swift.py"): {"swift"},
    Path("trainers/openrlhf.py"): {"torch"},
    Path("trainers/skyrl.py"): {"skyrl_gym"},
    Path("trainers/verifiers.py"): {"verifiers"},
    Path("trainers/verl_manager.py"): {"verl"},
}
"""What stands in their own environments anyway."""


# --- imports ----------------------------------------------------------------------------------------


def imports_of(file: Path) -> Iterator[str]:
    """Top-level names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield str(node.module).partition(".")[0]


def third_party(file: Path) -> set[str]:
    return set(imports_of(file)) - set(sys.stdlib_module_names)


def sources(package: str) -> list[Path]:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert len(files) > 3
    return files


@pytest.mark.parametrize("file", sources("shopr1_rewards"), ids=lambda file: file.stem)
def test_rewards_import_nothing_of_the_others(file: Path) -> None:
    allowed = {"shopr1_rewards", "pydantic", "pydantic_core", "rapidfuzz"}
    assert third_party(file) <= allowed | ({"torch"} if file.name == "self_certainty.py" else set())


@pytest.mark.parametrize("file", sources("shopr1_client"), ids=lambda file: file.stem)
def test_the_client_imports_little(file: Path) -> None:
    allowed = {"shopr1_client", "httpx", "pydantic", "pydantic_core", "stamina"}
    assert third_party(file) <= allowed | OF_TRAINERS.get(file.relative_to(PACKAGES["shopr1_client"]), set())


def test_no_module_of_the_rewards_imports_self_certainty() -> None:
    for file in sources("shopr1_rewards"):
        text = file.read_text("utf-8")
        assert not re.search(r"^\s*(from|import) shopr1_rewards\.self_certainty", text, re.MULTILINE)


def test_the_engine_knows_no_http_and_no_rules() -> None:
    for name in ("engine", "forward", "head"):
        file = PACKAGES["shopr1_service"] / f"{name}.py"
        assert not third_party(file) & {"fastapi", "starlette", "uvicorn", "httpx"}
        imported = re.findall(r"^from shopr1_service\.(\w+) import", file.read_text("utf-8"), re.MULTILINE)
        assert set(imported) <= {"errors", "forward", "head", "prefix"}


@pytest.mark.parametrize("folder", ["rewards", "service", "clients"])
def test_the_folders_are_no_packages(folder: str) -> None:
    # Or `import service` would work in the repository and nowhere else.
    assert [path.name for path in (ROOT / folder).iterdir() if not path.name.startswith((".", "__py"))] == [
        path.name for path in PACKAGES.values() if path.parent.name == folder
    ]


# --- the wheel --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [built] = directory.glob("*.whl")
    return built


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_three_packages(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in names_in(wheel)}
    [info] = [top for top in tops if top.endswith(".dist-info")]
    assert re.fullmatch(r"shopr1-\d+\.\d+\.\d+\.dist-info", info)
    assert tops - {info} == OURS


def test_the_wheel_holds_every_file_of_them(wheel: Path) -> None:
    held = {name for name in names_in(wheel) if name.partition("/")[0] in OURS}
    wanted = {
        f"{name}/{path.relative_to(directory).as_posix()}"
        for name, directory in PACKAGES.items()
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted
    assert wanted >= {"shopr1_rewards/recipes/shop_r1.toml", *(f"{name}/py.typed" for name in OURS)}


def test_the_wheel_has_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "shopr1 = shopr1_service.__main__:main" in archive.read(entry_points).decode()


# --- a bare environment -----------------------------------------------------------------------------

ALLOWED = {
    *("shopr1", "httpx", "pydantic", "rapidfuzz", "stamina", "tenacity"),
    *("anyio", "certifi", "h11", "httpcore", "idna", "sniffio", "typing-extensions"),
    *("annotated-types", "pydantic-core", "typing-inspection"),
}

SCRIPT = """
import sys
import shopr1_client, shopr1_client.wire, shopr1_rewards
from shopr1_rewards import judge, load_recipe, measured_terms, read_ground_truth, total

recipe = load_recipe("shop_r1")
truth = read_ground_truth({"type": "click", "name": "add_to_cart.buy_now"}, recipe.action_space)
answer = '{"rationale": "why", "action": {"type": "click", "name": "refinements.customer_reviews"}}'
judgement = judge(answer, truth, recipe)
print(total(judgement.components(measured_terms(26.0, recipe))))

request = shopr1_client.wire.ScoreRequest.model_validate({"groups": []})
with shopr1_client.Client("http://127.0.0.1:1", retry_for_s=0) as client:
    try:
        client.score(request)
    except shopr1_client.TransportError:
        print("no server")

heavy = ["torch", "transformers", "fastapi", "starlette", "uvicorn", "numpy", "shopr1_service"]
print([name for name in heavy if name in sys.modules])
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """Python of a new environment with the wheel and what it asks for."""
    directory = tmp_path_factory.mktemp("bare")
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python)]
    constraints = ROOT / "constraints.txt"
    subprocess.run([*pip, "install", "--constraint", str(constraints), str(wheel)], check=True)
    return python


def run_bare(python: Path, *arguments: str) -> list[str]:
    # Isolated: neither this directory nor the environment of the tests is seen.
    ended = subprocess.run(
        [str(python), "-I", *arguments], cwd=python.parent, check=True, capture_output=True, text=True
    )
    return ended.stdout.splitlines()


def test_a_trainer_scores_without_torch(bare_python: Path) -> None:
    # Figure 1: 0.5 + 0.3 + 0.2 + 0.005 · 26
    assert run_bare(bare_python, "-c", SCRIPT) == ["1.13", "no server", "[]"]


def test_the_base_install_is_small(bare_python: Path) -> None:
    listing = "from importlib.metadata import distributions as all\nfor d in all(): print(d.metadata['Name'])"
    installed = {name.lower().replace("_", "-") for name in run_bare(bare_python, "-c", listing)}
    assert {"shopr1", "httpx", "pydantic", "rapidfuzz", "stamina"} <= installed <= ALLOWED


def test_the_command_says_what_to_install(bare_python: Path) -> None:
    command = [str(bare_python.with_name("shopr1")), "serve"]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert ended.returncode == 1
    assert "pip install 'shopr1[service]'" in ended.stderr
    assert "Traceback" not in ended.stderr
