"""`shopr1 score`: with a server and in this process, resumed, and its errors."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shopr1_rewards import load_recipe
from shopr1_service.cli.score_file import ScoredLine
from shopr1_service.policy import loading
from shopr1_service.policy.fake import FakePolicy
from tests.support.command_line import Run, groups, write_lines
from tests.support.http import CLICK, SEARCH, answer, group, served, write_recipe

# --- score, with a server ---------------------------------------------------------------------------


def num_rollouts(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    families = text_string_to_metric_families(text)
    return sum(s.value for f in families for s in f.samples if s.name == "shopr1_rollouts_total")


def test_score_to_a_file(shopr1: Run, url: str, tmp_path: Path) -> None:
    lines = [
        group(answer(CLICK), answer(), truth=CLICK, id="a"),
        "",
        group("no", truth=json.dumps(SEARCH)),
        group(answer(), prompt="p" * 500),
    ]
    rollouts, output = write_lines(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    ended = shopr1("score", rollouts, "-o", output, "--url", url)
    assert (ended.code, ended.out) == (0, "")
    scored = [ScoredLine.model_validate_json(line) for line in output.read_text("utf-8").splitlines()]
    assert [(line.line, line.group.id) for line in scored] == [(1, "a"), (3, None), (4, None)]
    rewards = [[reward.reward for reward in line.group.rewards] for line in scored]
    assert rewards == [[1001.13, 0.63], [0.0], [None]]
    assert {line.policy.model for line in scored} == {"fake"}
    assert {line.recipe.digest for line in scored} == {load_recipe("shop_r1").digest}


def test_without_a_file_standard_output_is_jsonl(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts, output = write_lines(tmp_path / "in.jsonl", *groups(20)), tmp_path / "out.jsonl"
    ended = shopr1("score", rollouts, "--url", url)
    assert ended.code == 0
    assert [json.loads(line)["line"] for line in ended.out.splitlines()] == list(range(1, 21))
    shopr1("score", rollouts, "-o", output, "--url", url)
    assert output.read_text("utf-8") == ended.out


def test_an_interrupted_run_is_resumed(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts, output = write_lines(tmp_path / "in.jsonl", *groups(20)), tmp_path / "out.jsonl"
    shopr1("score", rollouts, "-o", output, "--url", url)
    whole, before = output.read_bytes(), num_rollouts(url)
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:13]) + lines[13][:50])
    ended = shopr1("score", rollouts, "-o", output, "--url", url)
    assert ended.code == 0
    assert "20/20" in ended.err
    assert output.read_bytes() == whole
    assert num_rollouts(url) - before == 7


def test_a_whole_run_is_not_scored_again(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts, output = write_lines(tmp_path / "in.jsonl", *groups(3)), tmp_path / "out.jsonl"
    shopr1("score", rollouts, "-o", output, "--url", url)
    whole, before = output.read_bytes(), num_rollouts(url)
    ended = shopr1("score", rollouts, "-o", output, "--url", url)
    assert (ended.code, output.read_bytes(), num_rollouts(url)) == (0, whole, before)
    assert re.search("reward *│ *0.9300", ended.err)


def test_output_of_another_input(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts, output = write_lines(tmp_path / "in.jsonl", *groups(3)), tmp_path / "out.jsonl"
    shopr1("score", rollouts, "-o", output, "--url", url)
    whole = output.read_bytes()
    write_lines(rollouts, *groups(1), group("changed"))
    ended = shopr1("score", rollouts, "-o", output, "--url", url)
    assert (ended.code, output.read_bytes()) == (2, whole)
    assert ended.error == f"{output}: has 3 lines, the input 2"


@pytest.mark.parametrize("num_done", [1, 3])
def test_output_of_another_recipe(shopr1: Run, tmp_path: Path, num_done: int) -> None:
    rollouts, output = write_lines(tmp_path / "in.jsonl", *groups(3)), tmp_path / "out.jsonl"
    with served(recipe=write_recipe(tmp_path)) as url:
        shopr1("score", rollouts, "-o", output, "--url", url, "--recipe", "shop_r1")
        whole = b"".join(output.read_bytes().splitlines(keepends=True)[:num_done])
        output.write_bytes(whole)
        ended = shopr1("score", rollouts, "-o", output, "--url", url, "--recipe", "mine")
    # Also where nothing is left to score: the file is not what was asked for.
    assert (ended.code, output.read_bytes()) == (2, whole)
    assert "the output was begun with recipe" in str(ended.error)


def test_output_of_another_policy(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts, output = write_lines(tmp_path / "in.jsonl", *groups(3)), tmp_path / "out.jsonl"
    shopr1("score", rollouts, "-o", output, "--url", url)
    [first, *_] = output.read_text("utf-8").splitlines()
    output.write_text(first.replace('"version":"0"', '"version":"step-500"') + "\n")
    ended = shopr1("score", rollouts, "-o", output, "--url", url)
    assert ended.code == 2
    assert "step-500" in str(ended.error)
    assert output.read_text("utf-8").count("\n") == 1


@pytest.mark.parametrize("name", ["in.jsonl", "run [a].jsonl"])
def test_a_malformed_line(shopr1: Run, url: str, tmp_path: Path, name: str) -> None:
    rollouts, before = write_lines(tmp_path / name, *groups(2), "", '{"prompt": 1}'), num_rollouts(url)
    ended = shopr1("score", rollouts, "-o", tmp_path / "out.jsonl", "--url", url)
    assert (ended.code, ended.out) == (2, "")
    assert str(ended.error).startswith(f"{rollouts}:4: prompt: must be a string")
    assert num_rollouts(url) == before
    assert not (tmp_path / "out.jsonl").exists()


def test_a_line_that_the_server_refuses(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts = write_lines(tmp_path / "in.jsonl", "", *groups(9), group(truth={"type": "click"}), *groups(3))
    output = tmp_path / "out.jsonl"
    ended = shopr1("score", rollouts, "-o", output, "--url", url)
    assert ended.code == 2
    # A blank line, nine good ones, and the one that is refused.
    assert str(ended.error).startswith("line 11: ground_truth.name: ")
    assert output.read_text("utf-8").count("\n") == 8


def test_a_recipe_that_the_server_has_not(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts = write_lines(tmp_path / "in.jsonl", *groups(1))
    ended = shopr1("score", rollouts, "--url", url, "--recipe", "nope")
    assert (ended.code, ended.out) == (2, "")
    assert "no recipe 'nope'; there are: shop_r1" in str(ended.error)


def test_half_a_surrogate_pair_is_scored_0(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts = write_lines(tmp_path / "in.jsonl", group("\ud83d", answer()))
    ended = shopr1("score", rollouts, "--url", url)
    assert ended.code == 0
    assert [reward["reward"] for reward in json.loads(ended.out)["group"]["rewards"]] == [0.0, 0.93]


def test_no_server(shopr1: Run, tmp_path: Path) -> None:
    rollouts = write_lines(tmp_path / "in.jsonl", *groups(1))
    ended = shopr1("score", rollouts, "--url", "http://127.0.0.1:1")
    assert (ended.code, ended.out) == (2, "")
    assert str(ended.error).startswith("GET http://127.0.0.1:1/health/ready: ConnectError")


def test_output_that_cannot_be_written(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts = write_lines(tmp_path / "in.jsonl", *groups(1))
    output = tmp_path / "missing" / "out.jsonl"
    ended = shopr1("score", rollouts, "-o", output, "--url", url)
    assert (ended.code, ended.error) == (2, f"{output}: No such file or directory")


def test_a_full_disk(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts = write_lines(tmp_path / "in.jsonl", *groups(1))
    ended = shopr1("score", rollouts, "-o", "/dev/full", "--url", url)
    assert (ended.code, ended.error) == (2, "/dev/full: No space left on device")


def test_the_rollouts_are_not_the_output(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts = write_lines(tmp_path / "in.jsonl", *groups(1))
    before, other = rollouts.read_bytes(), tmp_path / "other.jsonl"
    other.symlink_to(rollouts)
    for output in (rollouts, other):
        ended = shopr1("score", rollouts, "-o", output, "--url", url)
        assert (ended.code, rollouts.read_bytes()) == (2, before)
        assert ended.error == f"{output}: is the file of the rollouts; name another one for the rewards"


def test_output_that_is_none(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts = write_lines(tmp_path / "in.jsonl", *groups(1))
    output = write_lines(tmp_path / "notes.txt", "buy milk")
    ended = shopr1("score", rollouts, "-o", output, "--url", url)
    assert ended.code == 2
    assert str(ended.error).startswith(f"{output}:1: not an output of this command: the line: not JSON: ")


def test_a_file_that_cannot_be_read(
    shopr1: Run, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = write_lines(tmp_path / "in.jsonl", *groups(1))

    def refuse(_path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    ended = shopr1("score", rollouts, "--url", url)
    assert (ended.code, ended.error) == (2, f"{rollouts}: Input/output error")


def test_an_empty_file(shopr1: Run, url: str, tmp_path: Path) -> None:
    ended = shopr1("score", write_lines(tmp_path / "in.jsonl"), "--url", url)
    assert (ended.code, ended.out) == (0, "")


# --- score, in this process -------------------------------------------------------------------------


def test_score_without_a_server(shopr1: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    def load(settings: Any) -> FakePolicy:
        loaded.append(settings)
        return FakePolicy(26.0)

    monkeypatch.setattr(loading, "load_policy", load)
    rollouts = write_lines(tmp_path / "in.jsonl", *groups(9))
    mine = write_recipe(tmp_path, ("reward = 0.5", "reward = 0.25"))
    ended = shopr1("score", rollouts, "--recipe", mine, "--policy", "dir", "--set", "device=cpu")
    assert ended.code == 0
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert [line["group"]["id"] for line in lines] == [str(i) for i in range(9)]
    # 0.25 + 0.3 + 0.13
    assert [line["group"]["rewards"][0]["reward"] for line in lines] == [pytest.approx(0.68)] * 9
    assert {line["recipe"]["name"] for line in lines} == {"mine"}
    assert [(settings.policy, settings.device) for settings in loaded] == [("dir", "cpu")]


def test_score_with_a_policy_that_is_not_there(shopr1: Run, tmp_path: Path) -> None:
    rollouts = write_lines(tmp_path / "in.jsonl", *groups(1))
    ended = shopr1("score", rollouts, "--policy", tmp_path / "nope")
    assert (ended.code, ended.out) == (2, "")
    assert ended.error == f"no such directory: {tmp_path / 'nope'}"
