"""ms-swift 4.6: GRPO runs of a tiny model on a CPU. Only the engine's completions are prescribed.

Not tested, because it needs a GPU: vLLM as the engine.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from swift.infer_engine import TransformersEngine
from swift.infer_engine.protocol import (
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
    UsageInfo,
)
from swift.pipelines import rlhf_main
from swift.rl_core.advantage import compute_advantages
from swift.rl_core.data import GRPOSample
from swift.rl_core.grpo_algorithm import score_completions
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shopr1_client.base import BaseClient
from shopr1_client.errors import TransportError, UnscorableError
from shopr1_client.grouping import Rollout as SentRollout
from shopr1_client.trainers.ms_swift import ShopR1
from shopr1_client.trainers.service import Service
from shopr1_client.wire import Text, TokenIds
from tests.integration.trainers.live import ROUNDING, TOO_LONG, Live, Rollout, free_port, rollouts, sessions
from tests.integration.trainers.tokenizer import save_tokenizer

FLOAT32 = 1e-6
"""Relative: ms-swift stores rewards in float32."""
NUM_GENERATIONS = 6
"""Completions of every example session: the shortest has no more."""


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Untrained weights with the service's tokenizer."""
    directory = save_tokenizer(tmp_path_factory.mktemp("policy"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Rollout]:
    """The engine's completions in the order of the requests: each session's completions in turn."""
    answered: list[Rollout] = []

    def infer(engine: TransformersEngine, requests: Sequence[Any], *_: Any, **__: Any) -> list[Any]:
        seen: Counter[str] = Counter()
        for request in requests:
            [session] = [own for own in sessions() if own["prompt"] == request.messages]
            completion = session["completions"][seen[session["id"]]]
            answered.append(Rollout(session["prompt"], completion, session["ground_truth"]))
            seen[session["id"]] += 1
        return [_answer(engine.tokenizer, rollout) for rollout in answered[-len(requests) :]]

    monkeypatch.setattr(TransformersEngine, "infer", infer)
    return answered


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[SentRollout]:
    """The rollouts that the shim sends."""
    all_sent: list[SentRollout] = []
    score = Service.score

    async def kept(service: Service, own: Sequence[SentRollout]) -> Any:
        all_sent.extend(own)
        return await score(service, own)

    monkeypatch.setattr(Service, "score", kept)
    return all_sent


@pytest.mark.usefixtures("environment")
def test_training_run(
    policy: str, recorded: list[Rollout], sent: list[SentRollout], live: Live, tmp_path: Path
) -> None:
    """One batch per session, one after the other, each in a new event loop."""
    state = _train(policy, tmp_path, [_row(session) for session in sessions()])
    truths = live.rewards(recorded)
    tables = _tables(tmp_path)[: len(sessions())]  # ms-swift writes the last one twice
    assert [reward for table in tables for reward in table["ShopR1"]] == _approx(truths)
    assert len(set(truths)) > 5
    steps = [truths[i : i + NUM_GENERATIONS] for i in range(0, len(truths), NUM_GENERATIONS)]
    logged = [step["rewards/ShopR1/mean"] for step in state["log_history"][: len(steps)]]
    assert logged == _approx([fmean(reward or 0.0 for reward in step) for step in steps])
    assert len(logged) == len(sessions())
    tokenizer = AutoTokenizer.from_pretrained(policy)
    ids = [_ids(tokenizer, rollout.completion) for rollout in recorded]
    assert [rollout.completion for rollout in sent] == [TokenIds(token_ids=own) for own in ids]


@pytest.mark.usefixtures("environment")
def test_policy_sees_the_prompt_that_is_scored(policy: str, recorded: list[Rollout], tmp_path: Path) -> None:
    """ms-swift has its own templates; the service uses the policy's."""
    _train(policy, tmp_path, [_row(sessions()[0])])
    table = _tables(tmp_path)[0]
    tokenizer = AutoTokenizer.from_pretrained(policy)
    own = [
        tokenizer.apply_chat_template(rollout.prompt, tokenize=False, add_generation_prompt=True)
        for rollout in recorded
    ]
    assert table["prompt"] == own


@pytest.mark.usefixtures("environment")
def test_rollout_without_ids_is_scored_by_its_text(sent: list[SentRollout], live: Live) -> None:
    own = rollouts()
    assert _scored(own).tolist() == _approx(live.rewards(own))
    assert [rollout.completion for rollout in sent] == [Text(text=rollout.completion) for rollout in own]


@pytest.mark.usefixtures("environment")
def test_rollout_of_several_turns_is_scored_by_its_last_text(sent: list[SentRollout], live: Live) -> None:
    last = rollouts()[0]
    earlier = [{"role": "assistant", "content": "{}"}, {"role": "user", "content": "And then?"}]
    longer = Rollout([*last.prompt, *earlier], last.completion, last.ground_truth)
    scored = _scored([longer], response_token_ids=[[1, 2], [3]])
    assert scored.tolist() == _approx(live.rewards([longer]))
    assert [rollout.completion for rollout in sent] == [Text(text=last.completion)]


@pytest.mark.usefixtures("environment")
def test_unscorable_rollout() -> None:
    with pytest.raises(UnscorableError, match="sequence_too_long") as error:
        _scored(_with_one_too_long())
    assert [field["location"] for field in error.value.errors] == ["rollouts[1]"]


@pytest.mark.usefixtures("environment")
def test_configured_reward_of_an_unscorable_rollout(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOPR1_CLIENT_UNSCORABLE", "-1.5")
    own = _with_one_too_long()
    good, _, also_good = live.rewards(own)
    assert _scored(own).tolist() == _approx([good, -1.5, also_good])


def test_columns_are_arguments_of_the_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ms-swift hands them over: its samples keep `chat_template_kwargs`, and tools as JSON."""
    sent: list[SentRollout] = []

    async def stop(_service: Service, own: Sequence[SentRollout]) -> Any:
        sent.extend(own)
        raise InterruptedError

    monkeypatch.setattr(Service, "score", stop)
    messages = [{"role": "user", "content": "page"}, {"role": "assistant", "content": "x"}]
    row = {"messages": messages, "ground_truth": "{}"}
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [
        {**row, "chat_template_kwargs": {"enable_thinking": False}, "tools": json.dumps(tools)},
        {**row, "chat_template_kwargs": None, "tools": []},
    ]
    columns = [GRPOSample.from_row(each).to_reward_row() for each in rows]
    batch = {name: [each.get(name) for each in columns] for name in columns[0]}
    with pytest.raises(InterruptedError):
        asyncio.run(ShopR1(None)(["x", "x"], **batch))
    assert [own.options.given() for own in sent] == [
        {"chat_template_kwargs": {"enable_thinking": False, "tools": tools}},
        {},
    ]


def test_none_counts_as_0() -> None:
    """ms-swift counts a missing reward as 0; TRL excludes it from its group."""
    rewards = torch.tensor([[3.0], [torch.nan]])
    advantages, counted = compute_advantages(rewards, torch.ones(1), 2, scale_rewards="none")
    assert counted.tolist() == [3.0, 0.0]
    assert advantages.tolist() == [1.5, -1.5]


def test_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = BaseClient.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "retry_for_s", 0.0)  # instead of ten minutes
    monkeypatch.setenv("SHOPR1_CLIENT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TransportError):
        _scored(rollouts()[:2])


def _train(policy: str, directory: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    plugin = directory / "plugin.py"
    plugin.write_text("import shopr1_client.trainers.ms_swift\n")
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    options = {
        "rlhf_type": "grpo",
        "external_plugins": plugin,
        "reward_funcs": "shop_r1",
        "dataset": data,
        "model": policy,
        "model_type": "llama",
        "template": "chatml",
        "check_model": "false",  # needs the hub
        "tuner_type": "full",
        "torch_dtype": "float32",
        "num_generations": NUM_GENERATIONS,
        "per_device_train_batch_size": NUM_GENERATIONS,
        "gradient_accumulation_steps": 1,
        "max_steps": len(rows),
        "max_length": 4096,
        "logging_steps": 1,
        "log_completions": "true",
        "report_to": "none",
        "save_strategy": "no",
        "split_dataset_ratio": 0,
        "add_version": "false",
        "output_dir": directory / "out",
    }
    state: dict[str, Any] = rlhf_main([text for k, v in options.items() for text in (f"--{k}", str(v))])
    return state


def _row(session: dict[str, Any]) -> dict[str, Any]:
    return {"messages": session["prompt"], "ground_truth": session["ground_truth"]}


def _tables(directory: Path) -> list[dict[str, Any]]:
    """ms-swift's log of each batch."""
    lines = (directory / "out" / "completions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _ids(tokenizer: Any, completion: str) -> list[int]:
    return [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]


def _answer(tokenizer: Any, rollout: Rollout) -> ChatCompletionResponse:
    choice = ChatCompletionResponseChoice(
        index=0,
        message=ChatMessage(role="assistant", content=rollout.completion),
        finish_reason="stop",
        token_ids=_ids(tokenizer, rollout.completion),
    )
    return ChatCompletionResponse(model="recorded", choices=[choice], usage=UsageInfo(0, 0, 0))


def _approx(expected: Any) -> Any:
    return pytest.approx(expected, rel=FLOAT32, abs=ROUNDING)


def _with_one_too_long() -> list[Rollout]:
    first, second, third = rollouts()[:3]
    return [first, Rollout(TOO_LONG, second.completion, second.ground_truth), third]


def _scored(own: Sequence[Rollout], **fields: Any) -> torch.Tensor:
    """Score a batch like ms-swift's trainer."""
    samples = [_sample(rollout, **fields) for rollout in own]
    scores: torch.Tensor = score_completions(
        samples, [ShopR1()], [None], use_gym_env=False, device=torch.device("cpu")
    )
    return scores[:, 0]


def _sample(rollout: Rollout, **fields: Any) -> GRPOSample:
    messages = [*rollout.prompt, {"role": "assistant", "content": rollout.completion}]
    return GRPOSample.from_row({"messages": messages, "ground_truth": rollout.ground_truth, **fields})
