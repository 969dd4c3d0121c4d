"""verifiers 0.4: its own evaluation of examples/verifiers_env.py, and of NeMo Gym tasks, on a live service.

A small server replaces the policy. It returns the example completions of each session in turn.
"""

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import verifiers.v1 as vf
from transformers import AutoTokenizer
from verifiers.v1.cli.eval.runner import run_eval
from verifiers.v1.configs.cli.eval import EvalConfig
from verifiers.v1.graph import MessageNode
from verifiers.v1.trace import Branch, ModelCall
from verifiers.v1.types import SamplingConfig

from shopr1_client.base import BaseClient
from shopr1_client.reward_logs import log_values
from shopr1_client.trainers import verifiers as shim
from shopr1_client.wire import Message, Reward
from tests.integration.trainers.live import (
    LOG_KEYS,
    ROOT,
    ROUNDING,
    TIMEOUT_S,
    TOO_LONG,
    Live,
    Rollout,
    free_port,
    rollouts,
    sessions,
)
from tests.integration.trainers.serving import serving
from tests.integration.trainers.tokenizer import save_tokenizer

GROUP = 7
"""No session has more completions: each is sampled at least once."""
SHIM = "shopr1_client.trainers.verifiers:shop_r1"
FUNCTION_WEIGHT = 0.5

NATS = 1e-5
"""The tolerance for numbers in nats."""

pytestmark = pytest.mark.timeout(TIMEOUT_S)

Settings = dict[str, Any]


class _Policy(ThreadingHTTPServer):
    """Returns the completions of a prompt in turn, as chat completions or as vLLM's token ids."""

    daemon_threads = True
    request_queue_size = 64  # all rollouts connect at once

    def __init__(self, answers: dict[str, list[Any]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._answers = answers
        self._num_asked = dict.fromkeys(answers, 0)
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def next_answer(self, key: str) -> Any:
        with self._lock:
            i = self._num_asked[key]
            self._num_asked[key] += 1
        return self._answers[key][i % len(self._answers[key])]


class _Handler(BaseHTTPRequestHandler):
    server: _Policy

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self._generated(body) if self.path.endswith("/generate") else self._chat(body)
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.send_error(404)  # the maximum length of a prompt: unknown

    def log_message(self, *args: Any) -> None:
        pass

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant"} | self.server.next_answer(_key(body["messages"]))
        return {
            "id": "chat",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }

    def _generated(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self.server.next_answer(_key(body["token_ids"]))
        logprobs = {"content": [{"token": f"token_id:{i}", "logprob": -1.0} for i in ids]}
        choice = {"index": 0, "token_ids": ids, "logprobs": logprobs, "finish_reason": "stop"}
        return {"request_id": "generated", "choices": [choice]}


def _key(prompt: Any) -> str:
    return json.dumps(prompt)


@contextmanager
def _policy(answers: dict[str, list[Any]]) -> Iterator[_Policy]:
    with _Policy(answers) as policy:
        thread = threading.Thread(target=policy.serve_forever)
        thread.start()
        try:
            yield policy
        finally:
            policy.shutdown()
            thread.join()


def _texts(own: Sequence[Rollout]) -> dict[str, list[Any]]:
    """Completions by prompt."""
    answers: dict[str, list[Any]] = {}
    for rollout in own:
        answers.setdefault(_key(rollout.prompt), []).append({"content": rollout.completion})
    return answers


def _evaluate(
    taskset: Settings, client: Settings, directory: Path, group: int = GROUP, scoring_s: float | None = None
) -> list[Any]:
    """The traces of an evaluation by verifiers, in the order of the tasks."""
    agent: Settings = {"runtime": {"type": "subprocess"}, "harness": {"id": "verifiers_env"}}
    agent |= {"timeout": {"scoring": scoring_s}}
    config = EvalConfig(
        env={"taskset": taskset, "agent": agent},
        client=client,
        model="policy",
        num_rollouts=group,
        output_dir=directory,
        push=False,
        rich=None,
    )
    return [trace for episode in asyncio.run(run_eval(config)) for trace in episode.traces]


def _sessions(own: Sequence[Rollout], path: Path) -> Settings:
    """The example environment with the prompts of these rollouts."""
    tasks = {_key(rollout.prompt): rollout for rollout in own}
    lines = [
        json.dumps({"id": str(i), "prompt": rollout.prompt, "ground_truth": rollout.ground_truth})
        for i, rollout in enumerate(tasks.values())
    ]
    path.write_text("\n".join(lines), "utf-8")
    return {"id": "verifiers_env", "sessions": path}


def _run(
    own: Sequence[Rollout],
    directory: Path,
    group: int = GROUP,
    scoring_s: float | None = None,
    **taskset: Any,
) -> list[Any]:
    """An evaluation of the example environment with these rollouts as the policy's completions."""
    settings = _sessions(own, directory / "sessions.jsonl") | taskset
    with _policy(_texts(own)) as policy:
        return _evaluate(settings, {"base_url": policy.url}, directory, group, scoring_s)


def _told(live: Live, own: Sequence[Rollout]) -> dict[tuple[str, str], Reward]:
    """Results of `POST /score`, by prompt and completion."""
    answers = live.score(own)
    return {
        (_key(rollout.prompt), rollout.completion): Reward.model_validate(answer)
        for rollout, answer in zip(own, answers, strict=True)
    }


def _approx(expected: Any) -> Any:
    return pytest.approx(expected, rel=0.0, abs=ROUNDING)


def _seen(trace: Any) -> tuple[str, str]:
    """Prompt and completion as recorded by verifiers."""
    *prompt, answer = trace.messages
    return _key([message.model_dump() for message in prompt]), answer.content or ""


@pytest.fixture(autouse=True)
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `verifiers_env` importable, as with PYTHONPATH=examples."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.mark.usefixtures("environment")
def test_rewards(live: Live, tmp_path: Path) -> None:
    own = rollouts()
    told = _told(live, own)
    traces = _run(own, tmp_path)
    assert len(traces) == GROUP * len(sessions())
    assert {_seen(trace) for trace in traces} == told.keys()
    for trace in traces:
        reward = told[_seen(trace)]
        assert trace.ok
        assert trace.reward == _approx(reward.reward)
        assert trace.rewards.keys() == {"shop_r1"}
        assert trace.metrics == pytest.approx(log_values(reward), rel=0.0, abs=NATS)
    assert len({round(trace.reward, 3) for trace in traces}) > GROUP


@pytest.mark.usefixtures("environment")
def test_function(live: Live, tmp_path: Path) -> None:
    """The function in a taskset's configuration, with a weight."""
    own = rollouts()[:GROUP]
    told = _told(live, own)
    plugged = {"rewards": {"plugged": {"fn": SHIM, "weight": FUNCTION_WEIGHT}}}
    traces = _run(own, tmp_path, task=plugged)
    for trace in traces:
        reward = told[_seen(trace)].reward
        assert reward is not None
        assert trace.rewards["shop_r1"].value == _approx(reward)
        assert trace.rewards["plugged"].value == _approx(FUNCTION_WEIGHT * reward)


@pytest.mark.usefixtures("environment")
def test_command(live: Live, tmp_path: Path) -> None:
    """The command of the example's docstring."""
    own = rollouts()[:GROUP]
    told = _told(live, own)
    with _policy(_texts(own)) as policy:
        options = ["--client.base-url", policy.url, "--env.agent.runtime.type", "subprocess", "--no-push"]
        options += ["-m", "policy", "--no-rich", "-n", "1", "-r", str(GROUP), "-o", str(tmp_path)]
        command = [str(Path(sys.executable).with_name("vf-eval")), "verifiers_env", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "examples")}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)
    [path] = tmp_path.rglob("traces.jsonl")
    traces = [trace for line in path.read_text("utf-8").splitlines() for trace in json.loads(line)["traces"]]
    scores = [trace["rewards"]["shop_r1"]["score"] for trace in traces]
    rewards = [reward.reward for reward in told.values() if reward.reward is not None]
    assert sorted(scores) == _approx(sorted(rewards))


@pytest.mark.usefixtures("environment")
def test_unscorable(live: Live, tmp_path: Path) -> None:
    """Only the unscorable rollout fails."""
    good = rollouts()[0]
    scored, failed = _run([good, _too_long(good)], tmp_path, group=1)
    assert scored.ok
    assert [scored.reward] == _approx(live.rewards([good]))
    assert not failed.ok
    assert failed.rewards == {"shop_r1": None}
    assert [error.type for error in failed.errors] == ["TaskError"]
    assert "sequence_too_long" in failed.errors[0].message
    assert failed.metrics.keys() == set(LOG_KEYS)
    assert failed.metrics["shopr1/unscorable"] == 1.0


@pytest.mark.usefixtures("environment")
def test_number_for_unscorable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOPR1_CLIENT_UNSCORABLE", "0.25")
    [trace] = _run([_too_long(rollouts()[0])], tmp_path, group=1)
    assert trace.ok
    assert trace.reward == 0.25
    assert trace.metrics["shopr1/unscorable"] == 1.0


@pytest.mark.usefixtures("environment")
def test_no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    defaults = BaseClient.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "retry_for_s", 0.0)  # instead of ten minutes
    monkeypatch.setenv("SHOPR1_CLIENT_URL", f"http://127.0.0.1:{free_port()}")
    [trace] = _run(rollouts()[:1], tmp_path, group=1)
    assert not trace.ok
    assert trace.rewards == {"shop_r1": None}
    assert [error.type for error in trace.errors] == ["TaskError"]
    assert "TransportError" in trace.errors[0].message
    assert trace.metrics == {}


def test_timeout_of_scoring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """verifiers does not count it as a failure: only null and `is_timeout` differ from a reward of 0."""
    monkeypatch.setenv("SHOPR1_CLIENT_URL", f"http://127.0.0.1:{free_port()}")
    [trace] = _run(rollouts()[:1], tmp_path, group=1, scoring_s=0.5)
    assert trace.ok
    assert trace.is_timeout
    assert trace.rewards == {"shop_r1": None}
    assert trace.reward == 0.0


@pytest.mark.usefixtures("environment")
def test_reasoning(tmp_path: Path) -> None:
    """A completion whose text is only a part of the sampled tokens is not scored."""
    own = rollouts()[:1]
    answer = {"content": own[0].completion, "reasoning_content": "Mugs."}
    with _policy({_key(own[0].prompt): [answer]}) as policy:
        settings = _sessions(own, tmp_path / "sessions.jsonl")
        [trace] = _evaluate(settings, {"base_url": policy.url}, tmp_path, 1)
    assert not trace.ok
    assert trace.rewards == {"shop_r1": None}
    assert "reasoning" in trace.errors[0].message


@pytest.mark.usefixtures("environment")
def test_token_ids(live: Live, tmp_path: Path) -> None:
    """With the client for training the sampled token ids are scored, not their text."""
    path = save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(path)
    rollout = rollouts()[0]
    prompt = tokenizer.apply_chat_template(rollout.prompt, add_generation_prompt=True, return_dict=False)
    # Ids that no tokenizer would produce.
    completion = [token for character in rollout.completion for token in tokenizer.encode(character)]
    client = {"type": "train", "renderer_model_name": path, "renderer": {"name": "default"}}
    with _policy({_key(prompt): [[*completion, tokenizer.eos_token_id]]}) as policy:
        settings = _sessions([rollout], tmp_path / "sessions.jsonl")
        [trace] = _evaluate(settings, {"base_url": policy.url, **client}, tmp_path, 1)
    as_ids = Rollout({"token_ids": prompt}, {"token_ids": completion}, rollout.ground_truth)
    assert [trace.reward] == _approx(live.rewards([as_ids]))
    assert [trace.reward] != _approx(live.rewards([rollout]))


def test_arguments_of_the_chat_template_are_those_of_the_sampling() -> None:
    """The client for evaluation sends them to the policy beside the messages."""
    sampling = SamplingConfig.model_validate({"extra_body": {"chat_template_kwargs": {"x": 1, "y": None}}})
    [user, answer] = vf.UserMessage(content="page"), vf.AssistantMessage(content="x")
    nodes = [MessageNode(message=message) for message in (user, answer)]
    branch = Branch(index=0, nodes=nodes, calls=[ModelCall(sampling=sampling)])
    assert shim._options(branch).given() == {"chat_template_kwargs": {"x": 1}}
    assert shim._options(Branch(index=0, nodes=nodes)).given() == {}
    assert shim._texts(branch) == ([Message(role="user", content="page")], "x")
    nodes[0].tools = [vf.Tool(name="f", description="", parameters={})]
    with pytest.raises(ValueError, match="the harness offers tools"):
        shim._texts(branch)


def _too_long(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, prompt=TOO_LONG)


def _gym_run(service: Live, own: Sequence[Rollout], directory: Path, group: int = GROUP) -> list[Any]:
    """An evaluation of verifiers' NeMo Gym tasks with rewards from the service's `/verify`."""
    path = directory / "rows.jsonl"
    rows = {
        _key(rollout.prompt): {
            "responses_create_params": {"input": rollout.prompt},
            "ground_truth": rollout.ground_truth,
        }
        for rollout in own
    }
    path.write_text("\n".join(map(json.dumps, rows.values())), "utf-8")
    task = {"resources_url": f"{service.keyed_url}/dialects/nemo_gym"}
    settings = {"id": "nemo_gym", "dataset": path, "task": task}
    with _policy(_texts(own)) as policy:
        return _evaluate(settings, {"base_url": policy.url}, directory, group)


@pytest.fixture
def any_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness that accepts the tools of a NeMo Gym task, of which there are none."""
    monkeypatch.setattr("verifiers_env.OneTurn.SUPPORTS_MCP", True)


@pytest.mark.usefixtures("any_harness")
def test_nemo_gym(live: Live, tmp_path: Path) -> None:
    own = rollouts()[:GROUP]
    told = _told(live, own)
    traces = _gym_run(live, own, tmp_path)
    assert {_seen(trace) for trace in traces} == told.keys()
    for trace in traces:
        reward = told[_seen(trace)]
        assert trace.ok
        assert trace.reward == _approx(reward.reward)
        assert trace.rewards.keys() == {"nemo_gym"}
        logs = {key: trace.metrics[key] for key in LOG_KEYS}
        assert logs == pytest.approx(log_values(reward), rel=0.0, abs=NATS)
        assert trace.metrics.keys() - set(LOG_KEYS) == {"mask_sample"}


@pytest.mark.usefixtures("any_harness")
def test_nemo_gym_unscorable(live: Live, tmp_path: Path) -> None:
    """verifiers ignores the mask and uses 0.0; only the metrics show the difference."""
    [trace] = _gym_run(live, [_too_long(rollouts()[0])], tmp_path, 1)
    assert trace.ok
    assert trace.reward == 0.0
    assert trace.metrics["mask_sample"] == trace.metrics["shopr1/unscorable"] == 1.0


@pytest.mark.usefixtures("any_harness")
def test_nemo_gym_unscorable_is_error(tmp_path: Path) -> None:
    with serving(nemo_gym_unscorable="error") as service:
        [trace] = _gym_run(service, [_too_long(rollouts()[0])], tmp_path, 1)
    assert not trace.ok
    assert trace.rewards == {"nemo_gym": None}
    assert "422" in trace.errors[0].message


@pytest.mark.usefixtures("any_harness")
def test_nemo_gym_no_server(tmp_path: Path) -> None:
    [trace] = _gym_run(Live(f"http://127.0.0.1:{free_port()}"), rollouts()[:1], tmp_path, 1)
    assert not trace.ok
    assert trace.rewards == {}
    assert "ConnectError" in trace.errors[0].message
