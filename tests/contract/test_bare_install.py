"""The wheel, and the installation without extras: no torch and no web framework."""

import re
import subprocess
import sys
import venv
import zipfile
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


def test_the_wheel_contains_three_packages(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in names_in(wheel)}
    [info] = [top for top in tops if top.endswith(".dist-info")]
    assert re.fullmatch(r"shopr1-\d+\.\d+\.\d+\.dist-info", info)
    assert tops - {info} == OURS


def test_the_wheel_contains_every_file_of_the_packages(wheel: Path) -> None:
    packed = {name for name in names_in(wheel) if name.partition("/")[0] in OURS}
    wanted = {
        f"{name}/{path.relative_to(directory).as_posix()}"
        for name, directory in PACKAGES.items()
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == wanted
    assert wanted >= {"shopr1_rewards/recipes/shop_r1.toml", *(f"{name}/py.typed" for name in OURS)}


def test_the_wheel_has_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "shopr1 = shopr1_service.__main__:main" in archive.read(entry_points).decode()


# --- a bare environment -----------------------------------------------------------------------------

ALLOWED = {
    *("shopr1", "httpx", "pydantic", "stamina", "tenacity"),
    *("anyio", "certifi", "h11", "httpcore", "idna", "sniffio", "typing-extensions"),
    *("annotated-types", "pydantic-core", "typing-inspection"),
}

SCRIPT = """
import sys
import shopr1_client, shopr1_client.wire, shopr1_rewards
from shopr1_rewards import judge, load_recipe, measured_terms, read_ground_truth, total

recipe = load_recipe("shop_r1")
truth = read_ground_truth({"type": "click", "name": "add_to_cart.buy_now"}, recipe)
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
    """Python of a new environment with the wheel and its dependencies."""
    directory = tmp_path_factory.mktemp("bare")
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python)]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "install", "--no-compile", *constraints, str(wheel)], check=True)
    return python


def run_bare(python: Path, *arguments: str) -> list[str]:
    # Isolated (-I): the working directory and PYTHONPATH are ignored.
    completed = subprocess.run(
        [str(python), "-I", *arguments], cwd=python.parent, check=True, capture_output=True, text=True
    )
    return completed.stdout.splitlines()


def test_a_trainer_scores_without_torch(bare_python: Path) -> None:
    # Figure 1: 0.5 + 0.3 + 0.2 + 0.005 · 26
    assert run_bare(bare_python, "-c", SCRIPT) == ["1.13", "no server", "[]"]


def test_the_base_install_is_small(bare_python: Path) -> None:
    listing = "from importlib.metadata import distributions as all\nfor d in all(): print(d.metadata['Name'])"
    installed = {name.lower().replace("_", "-") for name in run_bare(bare_python, "-c", listing)}
    assert {"shopr1", "httpx", "pydantic", "stamina"} <= installed <= ALLOWED


def test_the_command_names_the_missing_extra(bare_python: Path) -> None:
    command = [str(bare_python.with_name("shopr1")), "serve"]
    completed = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert completed.returncode == 1
    assert "pip install 'shopr1[service]'" in completed.stderr
    assert "Traceback" not in completed.stderr
