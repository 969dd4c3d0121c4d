"""The `shopr1` command in its own process: output, signals, exit codes."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx
import pytest

from shopr1_client import Client
from tests.support.command_line import groups, run_process, write_lines
from tests.support.http import WAIT_S, answer, free_port, group


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
        [line] = map(json.loads, ended.stderr.splitlines())
        assert line["level"] == "critical"
        assert re.match(r"unknown .*max_grups.* \(value '3'\)", line["message"], re.IGNORECASE)


def test_the_error_is_a_line_of_text_where_the_log_is_text() -> None:
    ended = run_process("serve", "--set", "log_format=text", "--set", "max_grups=3")
    assert ended.returncode == 2
    assert ended.stderr == "error: unknown setting 'max_grups' (value '3'); is max_groups meant?\n"


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_serve_on_a_port_in_use(log_format: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = run_process("serve", "--port", str(port), "--set", f"log_format={log_format}")
    message = f"port: cannot listen on {port} on host '127.0.0.1': Address already in use"
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    if log_format == "text":
        assert last == f"error: {message}"
    else:
        lines = [json.loads(line) for line in ended.stderr.splitlines()]
        assert (lines[-1]["level"], lines[-1]["message"]) == ("critical", message)
    assert "Traceback" not in ended.stderr


HEAVY = ["fastapi", "httpx", "shopr1_client", "shopr1_rewards", "torch", "transformers"]
MODULES = """\
import sys
from shopr1_service.__main__ import main
sys.argv = ["shopr1", *{arguments}]
try:
    main()
finally:
    print(*sorted(set(sys.modules) & set({heavy})), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "imported"),
    [
        (["--help"], []),
        (["serve", "--help"], []),
        (["scoer"], []),
        (["recipe", "check", "shop_r1"], ["shopr1_rewards"]),
    ],
    ids=" ".join,
)
def test_commands_import_only_what_they_need(arguments: list[str], imported: list[str]) -> None:
    """Help comes at once: torch alone takes seconds."""
    code = MODULES.format(arguments=arguments, heavy=HEAVY)
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=WAIT_S, check=False
    )
    assert ended.stderr.split("\n")[-2].split() == imported


SERVE_FAKE = """\
import sys
import torch
from shopr1_service.cli import main as cli
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.server import uvicorn_server as server

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


"""`shopr1 serve` with a policy that loads at once, and that scores for each line of standard input."""


class Serving:
    """A server process that scores a group for every line it is given."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.log: list[str] = []
        self.url = self._read_url(self._pipe(process.stderr))
        # Without a reader the server would block on a full pipe.
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

    def resume(self, how: str = "") -> None:
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


# A shell's convention for Ctrl+C is 130; 0 where the parent process ignores the signal.
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
        serving.resume()
        serving.wait_until_scoring()
        serving.resume()
        asking.join()
        assert serving.end() == 0, "".join(serving.log)
    [response] = answers
    assert response.status_code == 200
    assert [scored["rewards"][0]["reward"] for scored in response.json()["groups"]] == [0.93, 0.93]


def test_an_abandoned_forward_does_not_delay_the_end() -> None:
    with serve_fake() as serving:
        serving.resume("never")
        headers = {"X-Request-Timeout": "0.5"}
        late = httpx.post(f"{serving.url}/score", json={"groups": [group(answer())]}, headers=headers)
        assert late.status_code == 504
        serving.wait_until_scoring()
        serving.process.send_signal(signal.SIGTERM)
        # The engine's thread is inside torch, and cannot be stopped.
        assert serving.end() == 0, "".join(serving.log)


def test_every_line_that_a_server_writes_is_json() -> None:
    port = free_port()
    command = [sys.executable, "-m", "shopr1_service", "serve", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as process:
        try:
            with Client(f"http://127.0.0.1:{port}") as client:
                client.wait_until_ready(WAIT_S)
        finally:
            process.terminate()
        _, written = process.communicate()
    lines = [json.loads(line) for line in written.splitlines()]
    # The embedded policy has been loaded, for which transformers likes to draw bars.
    assert any("is ready" in line["message"] for line in lines)
