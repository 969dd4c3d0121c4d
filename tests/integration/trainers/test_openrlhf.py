"""OpenRLHF 0.11: its executor requests rewards and its experience maker uses them, on a CPU.

vLLM, DeepSpeed and flash-attn need a GPU to be installed. OpenRLHF's modules import them.
"""

import asyncio
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest
import torch
from transformers import AutoTokenizer


class _GpuPackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules that replace the packages that need a GPU."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        is_one = name.partition(".")[0] in ("deepspeed", "flash_attn", "vllm")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_one else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return MagicMock(name=spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


sys.meta_path.insert(0, _GpuPackages())

from openrlhf.datasets.prompts_dataset import preprocess_data  # noqa: E402
from openrlhf.trainer.ppo_utils.experience import (  # noqa: E402
    Experience,
    make_experience_batch,
    split_experience_batch,
)
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator  # noqa: E402
from openrlhf.utils.agent import SingleTurnAgentExecutor  # noqa: E402

from shopr1_client.base import BaseClient  # noqa: E402
from tests.integration.trainers.live import (  # noqa: E402
    API_KEY,
    LOG_KEYS,
    ROUNDING,
    TIMEOUT_S,
    TOO_LONG,
    Live,
    Rollout,
    command,
    free_port,
    rollouts,
)
from tests.integration.trainers.scripts import arguments  # noqa: E402
from tests.integration.trainers.serving import serving  # noqa: E402
from tests.integration.trainers.tokenizer import save_tokenizer  # noqa: E402

ROUTE = "/dialects/openrlhf/get_reward"
FLOAT32 = 1e-6
"""Relative: OpenRLHF stores rewards in float32."""
NUM_SAMPLES = 7
"""Completions of the first session, which form a group."""

Response = dict[str, Any]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("policy")))


@pytest.fixture(scope="session")
def truths(live: Live) -> list[dict[str, Any]]:
    """The service's result for each of `rollouts()`."""
    return live.score(rollouts())


@pytest.fixture
def shim() -> str:
    spec = importlib.util.find_spec("shopr1_client.trainers.openrlhf")
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


@pytest.fixture(params=["url", "file"])
def remote_url(request: pytest.FixtureRequest, live: Live, shim: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of `--reward.remote_url`."""
    _tell_shim(monkeypatch, live.url)
    return shim if request.param == "file" else live.keyed_url + ROUTE


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace OpenRLHF's wait of a second between its tries."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """OpenRLHF's log, which is not passed to the root logger."""
    logger = logging.getLogger("openrlhf.utils.agent")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_rewards_equal_those_of_the_service(
    remote_url: str, tokenizer: Any, truths: list[dict[str, Any]]
) -> None:
    responses = _execute(remote_url, tokenizer, rollouts())
    rewards = [truth["reward"] for truth in truths]
    assert [_number(response["reward"]) for response in responses] == pytest.approx(
        rewards, rel=FLOAT32 if remote_url.endswith(".py") else 0.0, abs=ROUNDING
    )
    assert len(set(rewards)) > 5
    exact = [truth["details"]["exact_match"] for truth in truths]
    assert [_number(response["scores"]) for response in responses] == exact
    assert any(exact)


def test_terms_reach_the_experience(remote_url: str, tokenizer: Any, truths: list[dict[str, Any]]) -> None:
    experiences = _experiences(_execute(remote_url, tokenizer, rollouts()))
    for experience, truth in zip(experiences, truths, strict=True):
        assert [key for key in experience.info if key.startswith("shopr1/")] == list(LOG_KEYS)
        terms = {name: value or 0.0 for name, value in truth["components"].items()}
        logged = {name: experience.info[f"shopr1/{name}"].item() for name in terms}
        assert logged == pytest.approx(terms, rel=FLOAT32, abs=ROUNDING)
        assert experience.rewards.item() == pytest.approx(truth["reward"], rel=FLOAT32)


def test_experiences_can_be_concatenated_and_split(
    remote_url: str, tokenizer: Any, truths: list[dict[str, Any]]
) -> None:
    own = _experiences(_execute(remote_url, tokenizer, rollouts()))
    joined = Experience.concat_experiences(own, tokenizer.pad_token_id or 0)
    batch = make_experience_batch(split_experience_batch(joined))
    rewards = [truth["reward"] for truth in truths]
    assert batch.rewards.flatten().tolist() == pytest.approx(rewards, rel=FLOAT32)
    values = [truth["components"]["value"] for truth in truths]
    assert [value.item() for value in batch.info["shopr1/value"]] == pytest.approx(values, rel=FLOAT32)


def test_group_norm_does_not_clip(remote_url: str, tokenizer: Any, truths: list[dict[str, Any]]) -> None:
    group = _experiences(_execute(remote_url, tokenizer, rollouts()[:NUM_SAMPLES]))
    rewards = torch.tensor([truth["reward"] for truth in truths[:NUM_SAMPLES]])
    expected = (rewards - rewards.mean()) / rewards.std()
    returns = _returns(group, "group_norm", clip_range=(-10.0, 10.0))
    assert returns == pytest.approx(expected.tolist(), rel=1e-4)  # differences of float32 numbers


@pytest.mark.parametrize("estimator", ["rloo", "reinforce_baseline", "dr_grpo"])
def test_other_estimators_need_a_wider_clip_range(
    estimator: str, live: Live, tokenizer: Any, truths: list[dict[str, Any]]
) -> None:
    """They clip differences of rewards at 10 by default: all rollouts above the average become equal."""
    responses = _execute(live.keyed_url + ROUTE, tokenizer, rollouts()[:NUM_SAMPLES])
    clipped = _returns(_experiences(responses), estimator, clip_range=(-10.0, 10.0))
    assert set(clipped) == {-10.0, 10.0}
    whole = _returns(_experiences(responses), estimator, clip_range=(-2000.0, 2000.0))
    rewards = torch.tensor([truth["reward"] for truth in truths[:NUM_SAMPLES]])
    scale = NUM_SAMPLES / (NUM_SAMPLES - 1) if estimator == "rloo" else 1.0
    assert whole == pytest.approx(((rewards - rewards.mean()) * scale).tolist(), rel=1e-4)


def test_rewards_themselves_are_clipped_without_a_baseline(
    live: Live, tokenizer: Any, truths: list[dict[str, Any]]
) -> None:
    responses = _execute(live.keyed_url + ROUTE, tokenizer, rollouts()[:NUM_SAMPLES])
    rewards = [truth["reward"] for truth in truths[:NUM_SAMPLES]]
    clipped = _returns(_experiences(responses), "reinforce", clip_range=(-10.0, 10.0))
    assert clipped == pytest.approx([min(reward, 10.0) for reward in rewards], rel=FLOAT32)
    assert max(rewards) > 1000.0


@pytest.mark.usefixtures("no_pauses")
def test_unscorable_rollout_has_no_reward(
    remote_url: str, tokenizer: Any, log: pytest.LogCaptureFixture
) -> None:
    good, bad = _execute(remote_url, tokenizer, [rollouts()[0], _too_long()])
    assert (bad["reward"], bad["scores"], bad["extra_logs"]) == (None, None, {})
    # Only the shim logs the reason.
    assert ("sequence_too_long" in log.text) == remote_url.endswith(".py")
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'size'"):
        Experience.concat_experiences(_experiences([good, bad]), 0)
    # If the first rollout has no reward, OpenRLHF requires a reward model.
    assert Experience.concat_experiences(_experiences([bad, good]), 0).rewards is None


def test_shim_uses_the_configured_reward(
    shim: str, live: Live, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tell_shim(monkeypatch, live.url)
    monkeypatch.setenv("SHOPR1_CLIENT_UNSCORABLE", "-1.5")
    _check_number(shim, tokenizer)


def test_route_uses_the_configured_reward(tokenizer: Any) -> None:
    with serving(openrlhf_unscorable="-1.5") as service:
        _check_number(service.keyed_url + ROUTE, tokenizer)


@pytest.mark.usefixtures("no_pauses")
def test_retries_while_the_service_refuses(live: Live, tokenizer: Any, truths: list[dict[str, Any]]) -> None:
    with _refusing(live, [429, 503, 503, 429]) as url:
        [response] = _execute(url, tokenizer, rollouts()[:1])
    assert _number(response["reward"]) == pytest.approx(truths[0]["reward"], rel=0.0, abs=ROUNDING)
    with _refusing(live, [503] * 5) as url:
        [response] = _execute(url, tokenizer, rollouts()[:1])
    assert response["reward"] is None


@pytest.mark.usefixtures("no_pauses")
def test_no_service(shim: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    _tell_shim(monkeypatch, url)
    defaults = BaseClient.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "retry_for_s", 0.0)  # instead of ten minutes
    for remote_url in (url + ROUTE, shim):
        [response] = _execute(remote_url, tokenizer, rollouts()[:1])
        assert response["reward"] is None


def test_shim_retries_until_the_service_is_ready(
    shim: str, tokenizer: Any, truths: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first try finds no service, the next ones find a loading service."""
    port = free_port()
    _tell_shim(monkeypatch, f"http://127.0.0.1:{port}")
    environment = {"SHOPR1_API_KEYS": API_KEY, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command(port), env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            [response] = _execute(shim, tokenizer, rollouts()[:1])
        finally:
            process.terminate()
    assert _number(response["reward"]) == pytest.approx(truths[0]["reward"], rel=FLOAT32)


def test_example_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOPR1_CLIENT_URL", "http://shop:8000")
    monkeypatch.setenv("SHOPR1_CLIENT_API_KEY", API_KEY)
    module, name, *options = arguments("openrlhf_grpo.sh", tmp_path)
    assert (module, name) == ("-m", "openrlhf.cli.train_ppo_ray")
    args = _parsed(options, monkeypatch)
    assert args.reward.remote_url == [f"http://shop:8000/key/{API_KEY}{ROUTE}"]
    assert (args.algo.advantage.estimator, args.data.label_key) == ("group_norm", "label")


class _Parsed(Exception):  # noqa: N818  # no error: stops before the training
    pass


def _parsed(options: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """OpenRLHF's parsed options. Only the start of its program parses them."""
    parsed = []

    def stop(args: Any) -> None:
        parsed.append(args)
        raise _Parsed

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("openrlhf.utils.get_strategy", stop)
    monkeypatch.setattr(sys, "argv", ["train_ppo_ray", *options])
    with pytest.raises(_Parsed):
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
    return parsed[0]


def _tell_shim(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("SHOPR1_CLIENT_URL", url)
    monkeypatch.setenv("SHOPR1_CLIENT_API_KEY", API_KEY)


def _too_long() -> Rollout:
    first = rollouts()[0]
    return Rollout(TOO_LONG, first.completion, first.ground_truth)


def _check_number(remote_url: str, tokenizer: Any) -> None:
    responses = _execute(remote_url, tokenizer, [rollouts()[0], _too_long()])
    experiences = _experiences(responses)
    assert experiences[1].rewards.item() == -1.5
    assert [e.info["shopr1/unscorable"].item() for e in experiences] == [0.0, 1.0]
    joined = Experience.concat_experiences(experiences, 0)
    assert joined.rewards.flatten()[1].item() == -1.5


class _Engine:
    """Replaces vLLM and returns prescribed completions."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids

    async def generate(self, *args: Any, **options: Any) -> Any:
        output = SimpleNamespace(token_ids=self._token_ids, finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


def _execute(remote_url: str, tokenizer: Any, own: Sequence[Rollout]) -> list[Response]:
    """Process a batch of rows, with all rollouts at once like OpenRLHF's engine."""
    executor = SingleTurnAgentExecutor([remote_url])

    async def all_of_them() -> list[Response]:
        return await asyncio.gather(*(_execute_one(executor, tokenizer, rollout) for rollout in own))

    return asyncio.run(all_of_them())


async def _execute_one(executor: Any, tokenizer: Any, rollout: Rollout) -> Response:
    row = {"prompt": rollout.prompt, "label": _label(rollout.ground_truth)}
    prompt, label = preprocess_data(row, None, "prompt", "label", tokenizer.apply_chat_template)
    completion = tokenizer.encode(rollout.completion, add_special_tokens=False)
    response: Response = await executor.execute(
        prompt=prompt,
        label=label,
        sampling_params=SimpleNamespace(max_tokens=None, logprobs=None),
        max_length=1_000_000,
        hf_tokenizer=tokenizer,
        llm_engine=_Engine([*completion, tokenizer.eos_token_id]),
    )
    return response


def _label(truth: Any) -> str:
    """A column of strings. One example session already has its ground truth as JSON."""
    return truth if isinstance(truth, str) else json.dumps(truth)


def _number(value: Any) -> float:
    """A reward in OpenRLHF's forms: the only item of a list or a tensor, or a number."""
    return float(torch.as_tensor(value, dtype=torch.float64).item())


def _experiences(responses: Sequence[Response]) -> list[Any]:
    generator = SamplesGenerator.__new__(SamplesGenerator)  # its constructor needs engines
    return [
        generator._process_response_into_experience(response, max_len=1_000_000) for response in responses
    ]


def _returns(group: Sequence[Any], estimator: str, clip_range: tuple[float, float]) -> list[float]:
    """A rollout's return in OpenRLHF's loss, before whitening."""
    args = SimpleNamespace(
        algo=SimpleNamespace(
            advantage=SimpleNamespace(estimator=estimator, gamma=1.0, no_std_norm=False),
        ),
        reward=SimpleNamespace(clip_range=clip_range),
        rollout=SimpleNamespace(n_samples_per_prompt=len(group), micro_batch_size=1),
        train=SimpleNamespace(dynamic_batch_enable=False),
    )
    maker = RemoteExperienceMaker(
        None, None, None, None, SimpleNamespace(value=0.0), SimpleNamespace(args=args), _Padding
    )
    samples = maker.split_rollout_samples(list(group))
    for sample in samples:
        sample.kl = torch.zeros(sample.action_mask.shape)
    return [sample.info["return"].item() for sample in maker.compute_advantages_and_returns(samples)]


class _Padding:
    pad_token_id = 0


@contextmanager
def _refusing(live: Live, statuses: list[int]) -> Iterator[str]:
    """A service that rejects requests with these statuses, one after the other, before it scores."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(live, statuses)) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/key/{API_KEY}{ROUTE}"
        finally:
            server.shutdown()
            thread.join()
    assert not statuses  # each was returned


def _handler(live: Live, statuses: list[int]) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if statuses:
                self.send_error(statuses.pop(0))
                return
            headers = {"Content-Type": self.headers["Content-Type"]}
            answer = httpx.post(live.url + self.path, content=body, headers=headers, timeout=TIMEOUT_S)
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *args: Any) -> None: ...

    return Handler
