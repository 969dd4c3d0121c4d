"""The command line: what it prints where, and how it ends."""

import json
from pathlib import Path

import pytest
import yaml

from shopr1_rewards import load_recipe
from tests.support.command_line import Run
from tests.support.http import write_recipe

ROOT = Path(__file__).parents[3]


# --- recipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("shop_r1",)])
def test_recipe_show(shopr1: Run, arguments: tuple[str, ...]) -> None:
    ended = shopr1("recipe", "show", *arguments)
    recipe = load_recipe("shop_r1")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out) == {"digest": recipe.digest, **recipe.model_dump(mode="json")}


def test_recipe_show_of_a_file(shopr1: Run, tmp_path: Path) -> None:
    ended = shopr1("recipe", "show", write_recipe(tmp_path, ("dars = 1000.0", "dars = 7")))
    assert json.loads(ended.out)["action_space"]["dars"] == 7.0


def test_recipe_check(shopr1: Run, tmp_path: Path) -> None:
    mine = write_recipe(tmp_path)
    for name in ("shop_r1", mine):
        recipe = load_recipe(name)
        ended = shopr1("recipe", "check", name)
        assert (ended.code, ended.out) == (0, f"{recipe.name} is valid: {recipe.digest}\n")


def test_recipe_check_of_a_file_with_a_byte_order_mark(shopr1: Run, tmp_path: Path) -> None:
    mine = Path(write_recipe(tmp_path))
    mine.write_text(mine.read_text("utf-8"), "utf-8-sig")
    assert shopr1("recipe", "check", str(mine)).code == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("reward = 0.5", "reward = 'much'"), "format.reward"),
        (("alpha = 0.005", "alhpa = 0.005"), "self_certainty.alhpa"),
        (("[format]", "[format"), "not TOML"),
        (("threshold = 0.75", "threshold = 1.0"), "similarity: nothing exceeds threshold = 1"),
        (("temperature = 1.0", "temperature = 1e-300"), "self_certainty.temperature"),
        (("attributes.text", 'attributes.""'), "action_space.types.type_and_submit.attributes."),
        (("dars = 1000.0", f"dars = {'[' * 900}{']' * 900}"), "nested too deeply"),
        (("dars = 1000.0", f"dars = {'1' * 5000}"), "not TOML: Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("command", ["show", "check"])
def test_a_bad_recipe(shopr1: Run, tmp_path: Path, change: tuple[str, str], named: str, command: str) -> None:
    path = write_recipe(tmp_path, change)
    ended = shopr1("recipe", command, path)
    assert (ended.code, ended.out) == (2, "")
    assert ended.error is not None
    assert ended.error.startswith(f"{path}: ")
    assert named in ended.error


def test_an_unknown_recipe(shopr1: Run) -> None:
    ended = shopr1("recipe", "check", "nope")
    assert (ended.code, ended.out) == (2, "")
    assert ended.error == "no recipe 'nope': neither a file nor one of shop_r1"


def test_openapi(shopr1: Run) -> None:
    ended = shopr1("openapi")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == (ROOT / "openapi.yaml").read_text("utf-8")
    assert yaml.safe_load(ended.out)["info"]["title"] == "Shop-R1 reward service"


# --- usage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--help",), 0, "serve"),
        (("score", "--help"), 0, "JSONL"),
        (("scoer",), 2, "scoer"),
        (("score",), 2, "Missing argument 'rollouts'"),
        (("score", "missing.jsonl"), 2, "missing.jsonl"),
        (("score", "."), 2, "directory"),
        (("serve", "--port", "http"), 2, "port: must be an integer (got 'http')"),
        (("serve", "--set", "max_groups"), 2, "--set 'max_groups': must be KEY=VALUE"),
        (("serve", "--set", "max_grups=3"), 2, "unknown setting 'max_grups' (value '3')"),
        (("serve", "--set", "max_groups=0"), 2, "max_groups"),
        (("serve", "--port", "70000"), 2, "port"),
        (("serve", "--config", "missing.toml"), 2, "missing.toml"),
        (("serve", "--set", "port=[/x]"), 2, "'[/x]'"),
        (("serve", "--port", "1", "--set", "port=2"), 2, "--set 'port=2': port is given twice"),
        (("serve", "--set", "max_runs=1", "--set", "max_runs=2"), 2, "max_runs is given twice"),
        (("score", __file__, "--url", "http://x", "--policy", "y"), 2, "--policy: cannot be used with --url"),
        (("score", __file__, "--url", "http://x", "--set", "a=1"), 2, "--set: cannot be used with --url"),
        (("score", __file__, "-o", "."), 2, "directory"),
        (("serve", "--set", "[a]=1"), 2, "'[a]'"),
    ],
)
def test_usage(shopr1: Run, arguments: tuple[str, ...], code: int, part: str) -> None:
    ended = shopr1(*arguments)
    assert ended.code == code
    assert part in " ".join(f"{ended.out} {ended.err}".replace("│", " ").split())


def test_an_unknown_variable(shopr1: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOPR1_PROT", "9001")
    ended = shopr1("serve")
    assert ended.code == 2
    line = json.loads(ended.err)  # as all lines of a log that is not on a terminal
    assert line["message"] == "unknown environment variable SHOPR1_PROT (value '9001'); is SHOPR1_PORT meant?"
