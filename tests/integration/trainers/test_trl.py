"""TRL 1.16: steps of its GRPOTrainer on a CPU with the rewards of a live service.

The policy is tiny, but has learnt the completions of the example sessions: its samples are often valid.
Most runs do not sample but use those completions, through TRL's `rollout_func`.
"""

import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    TrainerCallback,
    TrainerState,
)
from trl import GRPOConfig, GRPOTrainer

from shopr1_client import Client
from shopr1_client.base import BaseClient
from shopr1_client.errors import TransportError
from shopr1_client.reward_logs import log_values
from shopr1_client.trainers.callback import PolicyPush
from shopr1_client.trainers.trl import _rollouts, shop_r1_reward, shop_r1_reward_sync
from shopr1_client.wire import Reward, ScoreResponse, TokenIds
from shopr1_client.wire_policy import PolicyState
from tests.integration.trainers.live import (
    API_KEY,
    LOG_KEYS,
    ROOT,
    ROUNDING,
    TIMEOUT_S,
    TOO_LONG,
    Live,
    Rollout,
    free_port,
    rollouts,
)
from tests.integration.trainers.serving import serving
from tests.integration.trainers.tokenizer import save_tokenizer

GROUP = 7
"""Maximum number of completions of a session: a group contains all of them."""
NUM_LESSONS = 120
_BOS = 0
"""A special token of the service's tokenizer."""
PROMPT_IDS = 48
"""Length of the prompt for the tiny policy. The service gets the whole prompt."""
FLOAT32 = 1e-6
"""Relative errors of a float32 number, as stored by TRL, and of a sum of a few."""

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class Run:
    """Tables and metrics of a TRL run.

    Attributes:
        generations: per batch of rollouts its table of completions, rewards and advantages.
        logs: of the steps for which new rollouts were made.
        change: the largest change of a weight.
    """

    generations: list[list[dict[str, Any]]]
    logs: list[dict[str, Any]]
    change: float


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a policy of two layers, and the service's tokenizer."""
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(directory), padding_side="left")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        sliding_window=PROMPT_IDS // 2,  # in two layers: earlier tokens are invisible
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MistralForCausalLM(config)
    _teach(model, tokenizer)
    model.save_pretrained(directory)
    return str(directory)


def _teach(model: MistralForCausalLM, tokenizer: Any) -> None:
    """Train the policy on the completions, so that samples have different rewards."""
    pairs = [(_prompt_ids(tokenizer, r.prompt), _completion_ids(tokenizer, r.completion)) for r in rollouts()]
    batch = tokenizer.pad({"input_ids": [prompt + ids for prompt, ids in pairs]}, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    is_followed = torch.tensor([[i >= length - len(ids) for i in range(1, length)] for _, ids in pairs])
    completed = torch.tensor([i for _, ids in pairs for i in ids])
    used, targets = torch.unique(completed, return_inverse=True)
    head = torch.nn.Parameter(model.lm_head.weight[used].detach().clone())
    # Ids that are in no completion get weights of 0, as one additional choice.
    others = torch.full((len(targets), 1), math.log(len(tokenizer) - len(used)))
    optimizer = torch.optim.AdamW([*model.model.layers.parameters(), head], lr=1e-2)
    for _ in range(NUM_LESSONS):
        hidden = model.model(**batch).last_hidden_state[:, :-1][is_followed]
        logits = torch.cat([hidden @ head.T, others], dim=1)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
    with torch.no_grad():
        model.lm_head.weight.zero_()[used] = head


def _prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    text = prompt if isinstance(prompt, str) else _templated(tokenizer, prompt)
    return list(tokenizer.encode(text, add_special_tokens=False))[-PROMPT_IDS:]


def _completion_ids(tokenizer: Any, completion: str) -> list[int]:
    return [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]


def _templated(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _key(prompt: Any) -> str:
    """A prompt as the key of a dictionary."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[0]["content"])


def train(
    policy: str,
    directory: Path,
    own: Sequence[Rollout],
    reward: RewardFunction = shop_r1_reward,
    *,
    samples: bool = False,
    num_generations: int = 1,
    per_device: int = GROUP,
    column: Callable[[Any], Any] = json.dumps,
    callbacks: Sequence[TrainerCallback] = (),
    lora: Any = None,
    num_copies: int = 1,
    **more: Any,
) -> Run:
    """Run the real trainer. Every batch of rollouts has one group per prompt."""
    rows = {_key(r.prompt): {"prompt": r.prompt, "ground_truth": column(_truth(r))} for r in own}
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    steps = len(rows) * GROUP // (per_device * world_size)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy),
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(list(rows.values()) * num_copies),
        rollout_func=None if samples else functools.partial(_given, own),
        callbacks=list(callbacks),
        peft_config=lora,
        args=GRPOConfig(
            output_dir=str(directory),
            per_device_train_batch_size=per_device,
            steps_per_generation=steps,
            num_generations=GROUP,
            max_steps=num_generations * steps,
            learning_rate=1e-3,
            max_completion_length=96,
            logging_steps=1,
            log_completions=True,
            num_completions_to_print=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            **more,
        ),
    )
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    trainer.train()
    after = list(trainer.model.parameters())
    change = max(float((a - b).detach().abs().max()) for a, b in zip(after, before, strict=True))
    tables = sorted((directory / "completions").glob("*.parquet"))[::steps]
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    return Run([pyarrow.parquet.read_table(table).to_pylist() for table in tables], logs, change)


def _given(own: Sequence[Rollout], prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """A rollout function that returns the rollouts' completions in turn."""
    texts: dict[str, list[str]] = defaultdict(list)
    for rollout in own:
        texts[_key(rollout.prompt)].append(rollout.completion)
    turns = {key: itertools.cycle(own_texts) for key, own_texts in texts.items()}
    tokenizer = trainer.processing_class
    return {
        "prompt_ids": [_prompt_ids(tokenizer, prompt) for prompt in prompts],
        "completion_ids": [_completion_ids(tokenizer, next(turns[_key(prompt)])) for prompt in prompts],
        "logprobs": None,  # only for rollouts of an older policy
    }


def _truth(rollout: Rollout) -> dict[str, str]:
    """The ground truth as an object. One session has it as JSON in a string."""
    truth: Any = rollout.ground_truth
    return dict(json.loads(truth) if isinstance(truth, str) else truth)


def _told(live: Live, own: Sequence[Rollout]) -> dict[tuple[str, str], Reward]:
    """Results of `POST /score`, by prompt and completion."""
    answers = live.score(own)
    return {
        (_key(rollout.prompt), rollout.completion): Reward.model_validate(answer)
        for rollout, answer in zip(own, answers, strict=True)
    }


def _check(run: Run, told: dict[tuple[str, str], Reward]) -> None:
    """Assert that TRL's tables and metrics contain exactly these rewards."""
    for table, log in zip(run.generations, run.logs, strict=True):
        rewards = [told[_key(row["prompt"]), _text(row["completion"])] for row in table]
        assert {(_key(row["prompt"]), _text(row["completion"])) for row in table} == told.keys()
        values = [reward.reward for reward in rewards if reward.reward is not None]
        assert [row["shop_r1_reward"] for row in table] == _approx(values)
        mean = statistics.fmean(values)
        assert log["rewards/shop_r1_reward/mean"] == pytest.approx(mean, rel=FLOAT32)
        _check_terms(log, rewards)
    assert run.change > 0


def _approx(expected: Any) -> Any:
    return pytest.approx(expected, rel=FLOAT32, abs=ROUNDING, nan_ok=True)


def _check_terms(log: dict[str, Any], rewards: Sequence[Reward]) -> None:
    values = [log_values(reward) for reward in rewards]
    means = {key: statistics.fmean(value[key] for value in values) for key in LOG_KEYS}
    assert {key: log[key] for key in log if key.startswith("shopr1/")} == pytest.approx(means, rel=FLOAT32)


@pytest.mark.usefixtures("environment")
def test_messages(policy: str, live: Live, tmp_path: Path) -> None:
    """Actions are objects: the data set gives each one the keys of all."""
    run = train(policy, tmp_path, rollouts(), num_generations=2, column=dict)
    assert len(run.generations) == 2
    _check(run, _told(live, rollouts()))


@pytest.mark.usefixtures("environment")
def test_strings_without_await(policy: str, live: Live, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    own = [Rollout(_templated(tokenizer, r.prompt), r.completion, r.ground_truth) for r in rollouts()]
    run = train(policy, tmp_path, own, functools.wraps(shop_r1_reward)(shop_r1_reward_sync))
    _check(run, _told(live, own))


@pytest.mark.usefixtures("environment")
def test_sampled(policy: str, live: Live, tmp_path: Path) -> None:
    """Sampled completions as token ids, some of them truncated at 96 tokens."""
    calls: list[tuple[list[Rollout], list[float | None]]] = []

    @functools.wraps(shop_r1_reward)
    async def recorded(**columns: Any) -> list[float | None]:
        rewards = await shop_r1_reward(**columns)
        ids = [{"token_ids": list(own)} for own in columns["completion_ids"]]
        truths = columns["ground_truth"]
        calls.append(([Rollout(*r) for r in zip(columns["prompts"], ids, truths, strict=True)], rewards))
        return rewards

    run = train(policy, tmp_path, rollouts(), recorded, samples=True)
    [(sampled, rewards)] = calls
    assert rewards == pytest.approx(live.rewards(sampled), rel=0.0, abs=ROUNDING)
    assert [row["shop_r1_reward"] for row in run.generations[0]] == _approx(rewards)
    assert len(set(rewards)) > 3  # otherwise the test is weak
    assert run.change > 0


@pytest.mark.usefixtures("environment", "live")
@pytest.mark.parametrize("is_text", [False, True])
def test_prompts_are_the_ids_from_which_the_policy_sampled(
    is_text: bool, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With arguments of the chat template, and a tokenizer that adds a BOS to texts."""
    saw: list[list[int]] = []
    sent: list[list[int]] = []
    generate = GRPOTrainer._generate_single_turn

    def watched(trainer: Any, prompt_ids: list[list[int]], *others: Any) -> Any:
        saw.extend(list(ids) for ids in prompt_ids)
        return generate(trainer, prompt_ids, *others)

    @functools.wraps(shop_r1_reward)
    async def recorded(**columns: Any) -> list[float | None]:
        names = ("prompts", "completions", "ground_truth", "completion_ids", "log_metric")
        prompts, completions, truths, ids, log_metric = (columns[name] for name in names)
        own = [rollout.prompt for rollout in _rollouts(prompts, completions, truths, ids, log_metric, {})]
        sent.extend(prompt.token_ids for prompt in own if isinstance(prompt, TokenIds))
        return await shop_r1_reward(**columns)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", watched)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    template = (
        tokenizer.chat_template + "{% if thoughts is defined %}<think>{{ thoughts }}</think>{% endif %}"
    )
    directory = _copy_of(policy, tmp_path / "policy", template)
    own = [Rollout("tea", r.completion, r.ground_truth) for r in rollouts()[:1]] if is_text else rollouts()
    train(directory, tmp_path, own, recorded, samples=True, chat_template_kwargs={"thoughts": "none"})
    assert sent == saw
    texts = {str(tokenizer.decode(ids)) for ids in sent}
    if is_text:
        assert texts == {f"{tokenizer.decode([_BOS])}tea"}
    else:
        assert all(text.endswith("<think>none</think>") for text in texts)


def test_prompts_are_the_ids_that_a_rollout_function_returns(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a name of their own: TRL keeps `prompt_ids` from reward functions."""
    returned: list[list[int]] = []
    sent: list[list[int]] = []
    given = _given

    def with_ids(own: Sequence[Rollout], prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = given(own, prompts, trainer)
        returned.extend(output["prompt_ids"])
        return {**output, "policy_prompt_ids": output["prompt_ids"]}

    def recorded(**columns: Any) -> list[float]:
        assert "prompt_ids" not in columns
        names = ("prompts", "completions", "ground_truth", "completion_ids", "log_metric")
        prompts, completions, truths, ids, log_metric = (columns[name] for name in names)
        own = _rollouts(prompts, completions, truths, ids, log_metric, columns)
        sent.extend(rollout.prompt.token_ids for rollout in own if isinstance(rollout.prompt, TokenIds))
        return [0.0] * len(own)

    monkeypatch.setattr(sys.modules[__name__], "_given", with_ids)
    train(policy, tmp_path, rollouts(), recorded)
    assert sent == returned
    assert sent


def _copy_of(policy: str, directory: Path, template: str) -> str:
    """The policy with another chat template, and a tokenizer that adds a BOS to texts."""
    shutil.copytree(policy, directory)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = template
    bos = tokenizer.convert_ids_to_tokens(_BOS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, _BOS)]
    )
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.usefixtures("environment")
def test_connection_lost(policy: str, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second batch of rollouts is sent twice; its rewards equal those of an undisturbed run."""
    with _forwarder(live.url, break_at=2) as forwarder:
        monkeypatch.setenv("SHOPR1_CLIENT_URL", forwarder.own_url)
        run = train(policy, tmp_path, rollouts(), num_generations=2)
    assert len(forwarder.bodies) == 3
    assert forwarder.bodies[1] == forwarder.bodies[2]
    assert len(run.generations) == 2
    _check(run, _told(live, rollouts()))


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("number", [None, -1.0])
def test_unscorable(
    number: float | None, policy: str, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole group, and one rollout of another group."""
    if number is not None:
        monkeypatch.setenv("SHOPR1_CLIENT_UNSCORABLE", str(number))
    own = [*rollouts()[:-6], *_too_long()]
    run = train(policy, tmp_path, own, _one_too_long)
    [table], [log] = run.generations, run.logs
    told = _told(live, own)
    expected = [told[_key(row["prompt"]), _text(row["completion"])].reward for row in table]
    assert expected.count(None) == GROUP
    rewards = [number if i == 0 or reward is None else reward for i, reward in enumerate(expected)]
    assert [_or_nan(row["shop_r1_reward"]) for row in table] == _approx([_or_nan(r) for r in rewards])
    groups = [rewards[i : i + GROUP] for i in range(0, len(rewards), GROUP)]
    advantages = [advantage for group in groups for advantage in _advantages(group)]
    # TRL divides the difference of two float32 numbers of up to 1000 by their deviation.
    assert [row["advantage"] for row in table] == pytest.approx(advantages, rel=1e-4, abs=1e-4)
    assert log["shopr1/unscorable"] == pytest.approx((GROUP + 1) / len(table), rel=FLOAT32)
    scored = [reward for reward in rewards if reward is not None]
    assert log["rewards/shop_r1_reward/mean"] == pytest.approx(statistics.fmean(scored), rel=FLOAT32)
    assert run.change > 0


def _too_long() -> list[Rollout]:
    """Rollouts of valid format. Others get 0 for any prompt, because they have no rationale."""
    return [Rollout(TOO_LONG, r.completion, r.ground_truth) for r in rollouts()[:4]]


@functools.wraps(shop_r1_reward)
async def _one_too_long(prompts: list[Any], **columns: Any) -> list[float | None]:
    # In practice a completion of thousands of tokens, too long for a trainer on a CPU.
    return await shop_r1_reward([TOO_LONG, *prompts[1:]], **columns)


def _or_nan(reward: float | None) -> float:
    """NaN for None, because pytest.approx accepts only NaN."""
    return math.nan if reward is None else reward


def _advantages(rewards: Sequence[float | None]) -> list[float]:
    """TRL's advantages of the scored rollouts: distance to the mean in standard deviations."""
    scored = [reward for reward in rewards if reward is not None]
    if not scored:
        return [0.0] * len(rewards)
    mean, deviation = statistics.fmean(scored), statistics.stdev(scored)
    return [0.0 if reward is None else (reward - mean) / (deviation + 1e-4) for reward in rewards]


def test_no_service(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = BaseClient.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "retry_for_s", 0.0)  # instead of ten minutes
    monkeypatch.setenv("SHOPR1_CLIENT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TransportError):
        train(policy, tmp_path, rollouts())


@pytest.mark.usefixtures("environment")
def test_two_ranks(policy: str, live: Live, tmp_path: Path) -> None:
    """One rank has a session, the other an unscorable prompt: the metrics are equal on both."""
    own = [*rollouts()[:GROUP], *_too_long()]
    port = free_port()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_rank, rank, port, policy, tmp_path, own) for rank in range(2)]
        [ours], [theirs] = ([_metrics(log) for log in future.result(TIMEOUT_S).logs] for future in futures)
    assert ours == theirs
    rewards = [reward for reward in live.rewards(own) if reward is not None]
    assert len(rewards) == GROUP
    assert ours["rewards/shop_r1_reward/mean"] == pytest.approx(statistics.fmean(rewards), rel=FLOAT32)
    assert ours.keys() > set(LOG_KEYS)
    assert ours["shopr1/unscorable"] == 0.5


def _rank(rank: int, port: int, policy: str, directory: Path, own: Sequence[Rollout]) -> Run:
    """One rank, started like by `accelerate launch --cpu --num_processes 2`."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in launched.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    # A separate directory: the first rank writes tables that the second would read.
    return train(policy, directory / str(rank), own)


def _metrics(log: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in log.items() if key.startswith(("shopr1/", "reward"))}


@pytest.fixture
def following(policy: str) -> Iterator[Live]:
    """A service with the trainer's own policy and an admin key, one for each test: its weights change."""
    with serving(policy=policy, api_keys=f"admin:{API_KEY}") as service:
        yield service


@dataclass
class Watch(TrainerCallback):
    """Runs after `PolicyPush`: records the service's version at the start and after each step."""

    url: str
    states: list[PolicyState] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._look()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        assert state.global_step == len(self.states)
        self._look()

    def _look(self) -> None:
        with Client(self.url, api_key=API_KEY) as client:
            self.states.append(client.policy())


@dataclass(frozen=True)
class Followed:
    """Results of a run with `PolicyPush`.

    Attributes:
        states: of the service, when training begins and after each step.
        answers: to the rollouts of each batch.
    """

    states: list[PolicyState]
    answers: list[ScoreResponse]


def follow(
    policy: str,
    directory: Path,
    service: Live,
    patch: pytest.MonkeyPatch,
    *,
    push_every: int = 1,
    **more: Any,
) -> Followed:
    """Run steps on the first session, each with new rollouts. A wrong version fails the run."""
    patch.setenv("SHOPR1_CLIENT_DEMAND", "exact")
    patch.setenv("SHOPR1_CLIENT_API_KEY", API_KEY)
    watch = Watch(service.url)
    with _forwarder(service.url) as forwarder:
        patch.setenv("SHOPR1_CLIENT_URL", forwarder.own_url)
        callbacks = [PolicyPush(service.url, push_every), watch]
        # The run ends within the first epoch.
        more |= {"callbacks": callbacks, "num_copies": 16}
        run = train(policy, directory, rollouts()[:GROUP], samples=True, **more)
    assert run.change > 0
    return Followed(watch.states, [ScoreResponse.model_validate_json(each) for each in forwarder.answers])


def _versions(answers: Sequence[ScoreResponse]) -> list[str]:
    return [version for answer in answers for version in {group.policy_version for group in answer.groups}]


def test_policy_updates(
    policy: str, following: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts of step n are scored by version n - 1, which sampled them."""
    run = follow(policy, tmp_path, following, monkeypatch, num_generations=3)
    assert [state.current.version for state in run.states] == ["0", "1", "2", "3"]
    assert _versions(run.answers) == ["0", "1", "2"]
    numbers = [state.current.number for state in run.states]
    assert [group.policy_number for answer in run.answers for group in answer.groups] == numbers[:3]
    assert numbers == list(range(numbers[0], numbers[0] + 4))


@pytest.mark.parametrize(
    ("more", "scored_by"),
    [
        ({"num_iterations": 2}, ["0", "2"]),
        ({"gradient_accumulation_steps": 2}, ["0", "0", "1", "1", "2", "2", "3", "3"]),
        ({"push_every": 3}, ["0", "0", "0", "3"]),
    ],
    ids=["iterations", "accumulation", "seldom"],
)
def test_version_that_scores(
    more: dict[str, Any],
    scored_by: list[str],
    policy: str,
    following: Live,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/trainers/trl.md with `steps_per_generation=1`: ⌊k * num_iterations / accumulation⌋."""
    run = follow(policy, tmp_path, following, monkeypatch, num_generations=4, **more)
    assert _versions(run.answers) == scored_by
    every = more.get("push_every", 1)
    assert [state.current.version for state in run.states] == [str(n - n % every) for n in range(5)]


def test_adapter_updates(
    policy: str, following: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the adapter is sent. It scores requests that name none."""
    peft = importlib.import_module("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with Client(following.url, api_key=API_KEY) as client:
        base = client.policy().base
    run = follow(policy, tmp_path, following, monkeypatch, num_generations=2, lora=lora)
    assert [(state.current.adapter, state.current.version) for state in run.states] == [
        ("default", "0"),
        ("default", "1"),
        ("default", "2"),
    ]
    assert [state.base for state in run.states] == [base] * 3
    groups = [group for answer in run.answers for group in answer.groups]
    assert [(group.adapter, group.policy_version) for group in groups] == [("default", "0"), ("default", "1")]


def test_example(policy: str, following: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOPR1_CLIENT_API_KEY", API_KEY)
    script = ROOT / "examples" / "trl_grpo.py"
    options = ["--url", following.url, "--policy", policy, "--steps", "2", "--output", str(tmp_path)]
    command = [sys.executable, str(script), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    lines = [line for line in run.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    assert all('"shopr1/format": ' in line for line in lines)
    assert run.stdout.splitlines()[-1] == "the service scores with version 2"


class _Forwarder(ThreadingHTTPServer):
    """Forwards requests, but resets the connection of at most one after it was read."""

    daemon_threads = True

    def __init__(self, url: str, break_at: int | None) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.url = url
        self.own_url = f"http://127.0.0.1:{self.server_port}"
        self.break_at = break_at
        self.bodies: list[bytes] = []
        self.answers: list[bytes] = []

    def shutdown_request(self, request: Any) -> None:
        request.close()  # without a shutdown, so that the client sees a reset


class _Forward(BaseHTTPRequestHandler):
    server: _Forwarder

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(body)
        if len(self.server.bodies) == self.server.break_at:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        headers = {name: self.headers[name] for name in ("Authorization", "Content-Type")}
        answer = httpx.post(self.server.url + self.path, content=body, headers=headers, timeout=TIMEOUT_S)
        self.server.answers.append(answer.content)
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.end_headers()
        self.wfile.write(answer.content)


@contextmanager
def _forwarder(url: str, break_at: int | None = None) -> Iterator[_Forwarder]:
    with _Forwarder(url, break_at) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
