"""The command line: what it prints where, and how it ends."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from shopr1_client import Client
from shopr1_rewards import load_recipe
from shopr1_service.cli import main as cli
from shopr1_service.cli.score_file import ScoredLine
from shopr1_service.policy import loading
from shopr1_service.policy.fake import FakePolicy
from tests.support.http import CLICK, SEARCH, WAIT_S, answer, free_port, group, served, write_recipe

ROOT = Path(__file__).parents[3]


class Ended:
    """How the command ended and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        _progress, found, message = " ".join(err.split()).rpartition("error: ")
        self.error = message if found else None


Run = Callable[..., Ended]


@pytest.fixture
def shopr1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `shopr1` in this process."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["shopr1", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        assert isinstance(code, int)
        return Ended(code, *capsys.readouterr())

    return run


def run_process(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shopr1_service", *arguments]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=WAIT_S, check=False, **kwargs
    )


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def groups(num: int) -> list[dict[str, Any]]:
    return [group(answer(), id=str(i)) for i in range(num)]


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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("reward = 0.5", "reward = 'much'"), "format.reward"),
        (("alpha = 0.005", "alhpa = 0.005"), "self_certainty.alhpa"),
        (("[format]", "[format"), "not TOML"),
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
        (("serve", "--port", "http"), 2, "Invalid value for '--port'"),
        (("serve", "--set", "max_groups"), 2, "--set 'max_groups': must be KEY=VALUE"),
        (("serve", "--set", "max_grups=3"), 2, "unknown setting 'max_grups' (value '3')"),
        (("serve", "--set", "max_groups=0"), 2, "max_groups"),
        (("serve", "--port", "70000"), 2, "port"),
        (("serve", "--config", "missing.toml"), 2, "missing.toml"),
        (("serve", "--set", "port=[/x]"), 2, "'[/x]'"),
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
    assert ended.error == "unknown environment variable SHOPR1_PROT (value '9001')"


# --- score, with a server ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(FakePolicy(26.0, max_sequence_tokens=500)) as address:
        yield address


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


def test_summary(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts = write_lines(
        tmp_path / "in.jsonl",
        group(answer(), answer(rationale="")),
        group(answer(CLICK), answer({"type": "click", "name": ""}), "no", truth=CLICK),
        group(answer(CLICK), truth=json.dumps(CLICK), prompt="p" * 500),
    )
    ended = shopr1("score", rollouts, "-o", tmp_path / "out.jsonl", "--url", url)
    rows = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in ended.err.splitlines() if line[:1] in "│┃"]
    assert [row for row in rows if any(row)] == [
        ["human's action", "click", "terminate", "all"],
        ["rollouts", "4", "2", "6"],
        ["unscorable", "1", "0", "1"],
        # click: of three scored ones two are valid, of the right type; one has a name, and the right one.
        # 0.5 · 2/3, 0.3 · 2/3, 0.2/3, 1000/3, 0.13 · 2/3; all: over five.
        ["format", "0.3333", "0.5000", "0.4000"],
        ["action_type", "0.2000", "0.3000", "0.2400"],
        ["attribute", "0.0667", "0.0000", "0.0400"],
        ["value", "333.3333", "0.0000", "200.0000"],
        # terminate: one of two has no rationale
        ["self_certainty", "0.0867", "0.0650", "0.0780"],
        # (1001.13 + 0.93 + 0)/3, (0.93 + 0.8)/2, (1002.06 + 1.73)/5
        ["reward", "334.0200", "0.8650", "200.7580"],
        # The unscorable one is an exact match as well.
        ["exact match", "0.5000", "1.0000", "0.6667"],
    ]


def test_a_torn_run_goes_on(shopr1: Run, url: str, tmp_path: Path) -> None:
    rollouts, output = write_lines(tmp_path / "in.jsonl", *groups(20)), tmp_path / "out.jsonl"
    shopr1("score", rollouts, "-o", output, "--url", url)
    whole, before = output.read_bytes(), num_rollouts(url)
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:13]) + lines[13][:50])
    ended = shopr1("score", rollouts, "-o", output, "--url", url)
    assert ended.code == 0
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
    ended = shopr1("score", rollouts, "-o", tmp_path / "missing" / "out.jsonl", "--url", url)
    assert ended.code == 2
    assert "out.jsonl" in ended.err


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


# --- in a process of its own ------------------------------------------------------------------------


def test_python_m() -> None:
    ended = run_process("recipe", "check", "shop_r1")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("shop_r1 is valid: sha256:")


def test_standard_output_of_a_process_is_jsonl(url: str, tmp_path: Path) -> None:
    rollouts = write_lines(tmp_path / "in.jsonl", *groups(9))
    ended = run_process("score", str(rollouts), "--url", url)
    assert ended.returncode == 0
    assert [json.loads(line)["line"] for line in ended.stdout.splitlines()] == list(range(1, 10))
    assert "Mean of each weighted term" in ended.stderr


def test_serve_ends_when_the_policy_cannot_be_loaded(tmp_path: Path) -> None:
    ended = run_process("serve", "--port", "0", "--policy", str(tmp_path / "nope"))
    assert ended.returncode == 1
    assert f"no such directory: {tmp_path / 'nope'}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_serve_refuses_an_unknown_setting() -> None:
    environment = {**os.environ, "SHOPR1_MAX_GRUPS": "3"}
    for ended in (
        run_process("serve", "--port", "0", "--set", "max_grups=3"),
        run_process("serve", "--port", "0", env=environment),
    ):
        assert ended.returncode == 2
        assert re.search(r"error: unknown .*max_grups.* \(value '3'\)", ended.stderr, re.IGNORECASE)
        assert "Traceback" not in ended.stderr


SERVE_FAKE = """\
import sys
import torch
from shopr1_service import cli, server
from shopr1_service.fake import FakePolicy

def hold():
    print("scoring", flush=True)
    if sys.stdin.readline() == "never\\n":
        matrix = torch.eye(500)
        while True:
            matrix = matrix @ matrix

server.load_policy = lambda settings, startup: FakePolicy(before_scoring=hold)
sys.argv = ["shopr1", "serve", "--port", "0", "--set", "max_groups=5"]
cli.main()
"""
"""`shopr1 serve` with a policy that is loaded at once, and that scores when it is told to."""


class Serving:
    """A server process that scores a group for every line it is given."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.log: list[str] = []
        self.url = self._read_url(self._pipe(process.stderr))
        # Somebody must read on, or the server would block on a full pipe.
        self._reader = threading.Thread(target=self.log.extend, args=(process.stderr,))
        self._reader.start()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def _read_url(self, stderr: IO[str]) -> str:
        for line in stderr:
            self.log.append(line)
            if match := re.search(r"running on (http://\S+)", line):
                return match.group(1)
        raise AssertionError("".join(self.log))

    def wait_until_scoring(self) -> None:
        assert self._pipe(self.process.stdout).readline() == "scoring\n"

    def go_on(self, how: str = "") -> None:
        stdin = self._pipe(self.process.stdin)
        stdin.write(f"{how}\n")
        stdin.flush()

    def end(self) -> int:
        code = self.process.wait(WAIT_S)
        self._reader.join()
        return code


@contextlib.contextmanager
def serve_fake() -> Iterator[Serving]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", SERVE_FAKE]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8") as process:
        try:
            yield Serving(process)
        finally:
            process.kill()


# A shell's convention for Ctrl+C is 130; 0 where whoever started the process ignores it.
@pytest.mark.parametrize(("sent", "codes"), [(signal.SIGTERM, {0}), (signal.SIGINT, {0, 130})])
def test_serve_until_a_signal(sent: signal.Signals, codes: set[int]) -> None:
    with serve_fake() as serving:
        with httpx.Client(base_url=serving.url, timeout=WAIT_S) as client:
            assert client.get("/health/live").json() == {"status": "live"}
            assert client.get("/openapi.json").json()["info"]["title"] == "Shop-R1 reward service"
        serving.process.send_signal(sent)
        assert serving.end() in codes, "".join(serving.log)
    assert any('"max_groups": 5' in line for line in serving.log)
    assert not any("Traceback" in line for line in serving.log)


def test_open_requests_are_answered_before_the_end() -> None:
    answers: list[httpx.Response] = []
    with serve_fake() as serving:

        def ask() -> None:
            # Too long for the engine to take both at once.
            body = {"groups": [group(answer(), prompt=prompt * 3000) for prompt in "ab"]}
            answers.append(httpx.post(f"{serving.url}/score", json=body, timeout=WAIT_S))

        asking = threading.Thread(target=ask)
        asking.start()
        serving.wait_until_scoring()
        serving.process.send_signal(signal.SIGTERM)
        serving.go_on()
        serving.wait_until_scoring()
        serving.go_on()
        asking.join()
        assert serving.end() == 0, "".join(serving.log)
    [response] = answers
    assert response.status_code == 200
    assert [scored["rewards"][0]["reward"] for scored in response.json()["groups"]] == [0.93, 0.93]


def test_a_forward_that_nobody_waits_for_does_not_hold_up_the_end() -> None:
    with serve_fake() as serving:
        serving.go_on("never")
        headers = {"X-Request-Timeout": "0.5"}
        late = httpx.post(f"{serving.url}/score", json={"groups": [group(answer())]}, headers=headers)
        assert late.status_code == 504
        serving.wait_until_scoring()
        serving.process.send_signal(signal.SIGTERM)
        # The engine's thread is inside of torch, and cannot be told to stop.
        assert serving.end() == 0, "".join(serving.log)


def test_every_line_that_a_server_writes_is_json() -> None:
    port = free_port()
    command = [sys.executable, "-m", "shopr1_service", "serve", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as process:
        with Client(f"http://127.0.0.1:{port}") as client:
            client.wait_until_ready(WAIT_S)
        process.terminate()
        _, written = process.communicate()
    lines = [json.loads(line) for line in written.splitlines()]
    # The embedded policy has been loaded, for which transformers likes to draw bars.
    assert any("is ready" in line["message"] for line in lines)
