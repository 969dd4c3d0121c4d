"""LLaMA-Factory 0.9.5: its PPO trainer on a CPU, with the rewards of a live service.

The policy is tiny and untrained; the example completions replace its samples.
"""

import json
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import httpx
import pytest
import requests
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead

from tests.integration.trainers.live import ROUNDING, TIMEOUT_S, TOO_LONG, Live, Rollout, free_port, rollouts
from tests.integration.trainers.serving import serving
from tests.integration.trainers.tokenizer import save_tokenizer

# PPO needs trl 0.9.6, but the rest of LLaMA-Factory requires trl 0.18.
os.environ["DISABLE_VERSION_CHECK"] = "1"
# LLaMA-Factory imports it for audio. The release on PyPI needs CUDA's libraries.
_torchaudio = sys.modules["torchaudio"] = ModuleType("torchaudio")
_torchaudio.__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.data import get_template_and_fix_tokenizer  # noqa: E402
from llamafactory.hparams import DataArguments, get_train_args  # noqa: E402
from llamafactory.train.ppo.ppo_utils import get_rewards_from_server  # noqa: E402
from llamafactory.train.ppo.trainer import CustomPPOTrainer  # noqa: E402
from llamafactory.train.ppo.workflow import run_ppo  # noqa: E402

ROUTE = "/dialects/llama_factory/v1/score/evaluation"
CUTOFF = 4096
MINI_BATCH = 2
NUM_MINI_BATCHES = 4
"""Mini-batches of a step, each of which is one request."""
UNSCORABLE = 0.25
"""Exact in float32."""
LOG_DIGITS = 1e-3
"""LLaMA-Factory logs a float32 mean of up to 1001 with four decimals."""
FLOAT32 = 1e-6
"""Relative: LLaMA-Factory stores rewards in float32."""

pytestmark = pytest.mark.timeout(TIMEOUT_S)


def _url(service: Live) -> str:
    return service.keyed_url + ROUTE


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a policy of one layer, and the service's tokenizer."""
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_tokenizer(directory))
    tokenizer.save_pretrained(directory)  # its class has a different name in older releases of transformers
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CUTOFF,
        tie_word_embeddings=False,  # LLaMA-Factory cannot save shared tensors
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def tokenizer(policy: str) -> Any:
    return AutoTokenizer.from_pretrained(policy)


def _prompt(tokenizer: Any, rollout: Rollout) -> str:
    """The text that LLaMA-Factory sends for a prompt, built as in docs/trainers/llama_factory.md."""
    system, user = rollout.prompt
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="smollm2"))
    answer = {"role": "assistant", "content": ""}
    ids, _ = template.encode_oneturn(tokenizer, [user, answer], system["content"])
    return str(tokenizer.decode(ids))


def _register(service: Live, tokenizer: Any, own: Sequence[Rollout]) -> None:
    labels = [{"prompt": _prompt(tokenizer, r), "ground_truth": r.ground_truth} for r in own]
    httpx.put(f"{service.keyed_url}/labels", json={"labels": labels}).raise_for_status()


def _text(tokenizer: Any, rollout: Rollout) -> str:
    """A rollout, decoded like by LLaMA-Factory."""
    return f"{_prompt(tokenizer, rollout)}{rollout.completion}{tokenizer.eos_token}"


def _approx(expected: Any) -> Any:
    return pytest.approx(expected, rel=FLOAT32, abs=ROUNDING)


class _Recorder:
    """Replaces sampling, and records the inputs of each step."""

    def __init__(self, tokenizer: Any, own: Sequence[Rollout]) -> None:
        self.rewards: dict[str, float] = {}
        self._tokenizer = tokenizer
        self._turns: dict[str, list[Rollout]] = {}
        for rollout in own:
            self._turns.setdefault(_prompt(tokenizer, rollout), []).append(rollout)

    def generate(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The next completion of each prompt, padded on the right."""
        padding = self._tokenizer.pad_token_id
        starts = [int((row != padding).nonzero()[0]) for row in input_ids]
        prompts = [self._tokenizer.decode(row[start:]) for row, start in zip(input_ids, starts, strict=True)]
        ids = [self._completion_ids(self._turns[prompt].pop(0).completion) for prompt in prompts]
        completions = pad_sequence(ids, batch_first=True, padding_value=float(padding))
        return torch.cat([input_ids, completions], dim=1)

    def record(self, queries: Sequence[Any], responses: Sequence[Any], rewards: Sequence[Any]) -> None:
        for query, response, reward in zip(queries, responses, rewards, strict=True):
            assert reward.dtype == torch.float32
            self.rewards[self._tokenizer.decode(torch.cat([query, response]))] = float(reward)

    def _completion_ids(self, completion: str) -> torch.Tensor:
        ids = self._tokenizer.encode(completion, add_special_tokens=False)
        return torch.tensor([*ids, self._tokenizer.eos_token_id])


@pytest.fixture
def recorder(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> _Recorder:
    recorder = _Recorder(tokenizer, rollouts()[: MINI_BATCH * NUM_MINI_BATCHES])
    step = CustomPPOTrainer.step

    def recorded_step(self: Any, queries: Any, responses: Any, rewards: Any) -> Any:
        recorder.record(queries, responses, rewards)
        return step(self, queries, responses, rewards)

    def generate(self: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        return recorder.generate(input_ids)

    monkeypatch.setattr(CustomPPOTrainer, "step", recorded_step)
    monkeypatch.setattr(AutoModelForCausalLMWithValueHead, "generate", generate)
    return recorder


def _write_rows(own: Sequence[Rollout], directory: Path) -> None:
    """A data set in LLaMA-Factory's format alpaca."""
    names = ("system", "instruction")
    rows = [{name: m["content"] for name, m in zip(names, r.prompt, strict=True)} for r in own]
    (directory / "rows.json").write_text(json.dumps([row | {"output": ""} for row in rows]), "utf-8")
    columns = {"system": "system", "prompt": "instruction", "response": "output"}
    info = {"shop": {"file_name": "rows.json", "columns": columns}}
    (directory / "dataset_info.json").write_text(json.dumps(info), "utf-8")


def _train(policy: str, url: str, own: Sequence[Rollout], directory: Path) -> dict[str, Any]:
    """Run one step of LLaMA-Factory's PPO over these rollouts. Returns its logs."""
    _write_rows(own, directory)
    options = {
        "stage": "ppo",
        "do_train": True,
        "model_name_or_path": policy,
        "template": "smollm2",
        "finetuning_type": "full",
        "reward_model_type": "api",
        "reward_model": url,
        "dataset_dir": str(directory),
        "dataset": "shop",
        "cutoff_len": CUTOFF,
        "output_dir": str(directory / "output"),
        "per_device_train_batch_size": MINI_BATCH,
        "gradient_accumulation_steps": 1,
        "ppo_buffer_size": NUM_MINI_BATCHES,
        "ppo_epochs": 1,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    run_ppo(*get_train_args(options))
    state = json.loads((directory / "output" / "trainer_state.json").read_text("utf-8"))
    [log] = state["log_history"]
    return dict(log)


def test_training(policy: str, tokenizer: Any, recorder: _Recorder, live: Live, tmp_path: Path) -> None:
    own = rollouts()[: MINI_BATCH * NUM_MINI_BATCHES]
    _register(live, tokenizer, own)
    log = _train(policy, _url(live), own, tmp_path)
    told = dict(zip((_text(tokenizer, r) for r in own), live.rewards(own), strict=True))
    assert recorder.rewards == _approx(told)
    assert len(set(told.values())) > MINI_BATCH
    assert log["reward"] == pytest.approx(fmean(recorder.rewards.values()), abs=LOG_DIGITS)


def test_order(tokenizer: Any, live: Live) -> None:
    """All rollouts in one request, in a different order."""
    own = rollouts()[::-1]
    _register(live, tokenizer, own)
    rewards = get_rewards_from_server(_url(live), [_text(tokenizer, rollout) for rollout in own])
    assert [float(reward) for reward in rewards] == _approx(live.rewards(own))


def test_not_registered(live: Live) -> None:
    """The run ends without a reason; the service's response contains it."""
    messages = ["Which prompt is this? {}"]
    with pytest.raises(KeyError, match="scores"):
        get_rewards_from_server(_url(live), messages)
    answer = httpx.post(_url(live), json={"model": "model", "messages": messages}, timeout=TIMEOUT_S)
    assert answer.status_code == 422
    assert [error["location"] for error in answer.json()["errors"]] == ["messages[0]"]


def _too_long(service: Live) -> str:
    """An unscorable rollout with a registered prompt."""
    prompt = TOO_LONG[0]["content"]
    label = {"prompt": prompt, "ground_truth": {"type": "terminate"}}
    httpx.put(f"{service.keyed_url}/labels", json={"labels": [label]}).raise_for_status()
    return f"{prompt}{rollouts()[0].completion}"


def test_unscorable(tokenizer: Any, live: Live) -> None:
    """A single unscorable rollout ends the run."""
    own = rollouts()[:1]
    _register(live, tokenizer, own)
    messages = [_text(tokenizer, own[0]), _too_long(live)]
    with pytest.raises(KeyError, match="scores"):
        get_rewards_from_server(_url(live), messages)
    answer = httpx.post(_url(live), json={"model": "model", "messages": messages}, timeout=TIMEOUT_S).json()
    assert answer["code"] == "unscorable"
    assert [error["location"] for error in answer["errors"]] == ["messages[1]"]


def test_number_for_unscorable(tokenizer: Any) -> None:
    own = rollouts()[:1]
    with serving(llama_factory_unscorable=str(UNSCORABLE)) as service:
        _register(service, tokenizer, own)
        messages = [_text(tokenizer, own[0]), _too_long(service)]
        rewards = get_rewards_from_server(_url(service), messages)
        expected = [*service.rewards(own), UNSCORABLE]
    assert [float(reward) for reward in rewards] == _approx(expected)


def test_no_key(live: Live) -> None:
    with pytest.raises(KeyError, match="scores"):
        get_rewards_from_server(live.url + ROUTE, ["Any."])


def test_no_server() -> None:
    with pytest.raises(requests.ConnectionError):
        get_rewards_from_server(f"http://127.0.0.1:{free_port()}{ROUTE}", ["Any."])
