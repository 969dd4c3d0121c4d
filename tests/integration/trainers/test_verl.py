"""verl 0.9: its reward managers, its workers on Ray and the interface to its agent loop, on a CPU.

Not tested, because it needs a GPU: generation, and the training step.
"""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hydra import compose, initialize_config_module
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput, AgentLoopWorker
from verl.experimental.reward_loop import RewardLoopManager, migrate_legacy_reward_impl
from verl.experimental.reward_loop.reward_manager import NaiveRewardManager
from verl.trainer.ppo.metric_utils import process_validation_metrics
from verl.trainer.ppo.reward import load_reward_manager
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils import hf_tokenizer
from verl.utils.config import validate_config

from shopr1_client.base import BaseClient
from shopr1_client.errors import TransportError, UnscorableError
from shopr1_client.trainers.service import Service
from shopr1_client.trainers.verl import compute_score
from shopr1_client.trainers.verl_manager import ShopR1RewardManager
from shopr1_client.wire import Message, TokenIds
from tests.integration.trainers.live import (
    API_KEY,
    LOG_KEYS,
    ROUNDING,
    TOO_LONG,
    Live,
    Rollout,
    free_port,
    rollouts,
)
from tests.integration.trainers.scripts import arguments
from tests.integration.trainers.tokenizer import save_tokenizer

KEYS = ["score", *LOG_KEYS]
FUNCTION = [
    "reward.custom_reward_function.path=pkg://shopr1_client.trainers.verl",
    "reward.custom_reward_function.name=compute_score",
]
MANAGER = [
    "reward.reward_manager.source=importlib",
    "reward.reward_manager.module.path=pkg://shopr1_client.trainers.verl_manager",
    "reward.reward_manager.name=ShopR1RewardManager",
]
HOOKS = pytest.mark.parametrize("hook", [FUNCTION, MANAGER], ids=["function", "manager"])


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def loop_worker(policy: str) -> AgentLoopWorker:
    """verl's worker without the engine that its constructor needs."""
    worker = AgentLoopWorker.__new__(AgentLoopWorker)
    worker.tokenizer = hf_tokenizer(policy)
    worker.processor = None
    worker.mm_processor_kwargs = {}
    return worker


@pytest.fixture(scope="session")
def truths(live: Live) -> list[dict[str, Any]]:
    """The service's result for each of `rollouts()`."""
    return live.score(rollouts())


@pytest.fixture(scope="module")
def workers(policy: str, live: Live) -> Iterator[RewardLoopManager]:
    """verl's reward workers in two processes, which get the service's URL from the options."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    options = [*_kwargs(url=live.url, api_key=API_KEY), "reward.num_workers=2"]
    yield RewardLoopManager(_config(policy, *MANAGER, *options))
    ray.shutdown()


@HOOKS
@pytest.mark.usefixtures("environment")
def test_rewards_equal_those_of_the_service(
    hook: list[str], policy: str, loop_worker: AgentLoopWorker, truths: list[dict[str, Any]]
) -> None:
    results = _run(_config(policy, *hook), loop_worker, rollouts())
    assert [result["reward_score"] for result in results] == _approx(_rewards(truths))
    assert len(set(_rewards(truths))) > 5
    for result, truth in zip(results, truths, strict=True):
        info = result["reward_extra_info"]
        assert list(info) == KEYS
        terms = {name: value or 0.0 for name, value in truth["components"].items()}
        assert {name: info[f"shopr1/{name}"] for name in terms} == _approx(terms)


def test_verl_loads_the_named_classes(policy: str, loop_worker: AgentLoopWorker) -> None:
    managers = [
        load_reward_manager(_config(policy, *hook), loop_worker.tokenizer) for hook in (FUNCTION, MANAGER)
    ]
    assert [type(manager) for manager in managers] == [NaiveRewardManager, ShopR1RewardManager]


@pytest.mark.usefixtures("environment")
def test_manager_batches_rollouts_that_end_together(
    policy: str, loop_worker: AgentLoopWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    score = Service.score

    async def counted(service: Service, own: Sequence[Any]) -> Any:
        sizes.append(len(own))
        return await score(service, own)

    monkeypatch.setattr(Service, "score", counted)
    _run(_config(policy, *MANAGER), loop_worker, rollouts())
    assert sizes == [len(rollouts())]


def test_workers_score_a_batch(
    workers: RewardLoopManager, loop_worker: AgentLoopWorker, truths: list[dict[str, Any]]
) -> None:
    batch = _batch(loop_worker, rollouts())
    scored = workers.compute_rm_score(batch)
    scores = scored.non_tensor_batch["score"].tolist()
    assert scores == _approx(_rewards(truths))
    at_once = torch.tensor(scores, dtype=torch.float32).tolist()  # as verl stores them
    assert scored.batch["rm_scores"].sum(-1).tolist() == at_once
    ends = batch.batch["attention_mask"][:, batch.batch["prompts"].shape[1] :].sum(-1, keepdim=True) - 1
    assert scored.batch["rm_scores"].gather(1, ends).squeeze(-1).tolist() == at_once
    assert scored.meta_info["reward_extra_keys"] == KEYS


@pytest.mark.parametrize("indices", [[-1], [0, -1], [-1, 0]])
def test_workers_score_while_others_generate(
    indices: list[int], workers: RewardLoopManager, loop_worker: AgentLoopWorker, truths: list[dict[str, Any]]
) -> None:
    """The agent loop pads prompts on the right and passes all parts of a rollout; the last counts."""
    scored = _handed_over(workers, loop_worker, [rollouts()[i] for i in indices])
    assert scored.reward_score == _approx(truths[indices[-1]]["reward"])
    assert list(scored.extra_fields["reward_extra_info"]) == KEYS


def test_validation_averages_the_terms(
    workers: RewardLoopManager, loop_worker: AgentLoopWorker, truths: list[dict[str, Any]]
) -> None:
    own = rollouts()
    scored = workers.compute_rm_score(_batch(loop_worker, own))
    infos = {key: scored.non_tensor_batch[key].tolist() for key in KEYS}
    metrics = process_validation_metrics(["shop"] * len(own), ["a prompt"] * len(own), infos)["shop"]
    assert set(metrics) == set(KEYS)
    values = [truth["components"]["value"] for truth in truths]
    assert metrics["shopr1/value"][f"mean@{len(own)}"] == np.mean(values)


@pytest.mark.usefixtures("environment")
def test_unscorable_rollout_fails_alone(
    policy: str, loop_worker: AgentLoopWorker, truths: list[dict[str, Any]]
) -> None:
    good, failed, also_good = _run(_config(policy, *MANAGER), loop_worker, _with_one_too_long())
    assert isinstance(failed, UnscorableError)
    assert "sequence_too_long" in failed.errors[0]["message"]
    rewards = _rewards(truths)
    assert [good["reward_score"], also_good["reward_score"]] == _approx([rewards[0], rewards[2]])


@HOOKS
@pytest.mark.usefixtures("environment")
def test_configured_reward_of_an_unscorable_rollout(
    hook: list[str], policy: str, loop_worker: AgentLoopWorker
) -> None:
    config = _config(policy, *hook, *_kwargs(unscorable=-1.5))
    infos = [result["reward_extra_info"] for result in _run(config, loop_worker, _with_one_too_long())]
    assert [list(info) for info in infos] == [KEYS] * 3
    assert [info["shopr1/unscorable"] for info in infos] == [0.0, 1.0, 0.0]
    assert infos[1]["score"] == -1.5


def test_error_crosses_processes(workers: RewardLoopManager, loop_worker: AgentLoopWorker) -> None:
    with pytest.raises(UnscorableError, match="sequence_too_long"):
        workers.compute_rm_score(_batch(loop_worker, _with_one_too_long()))


@HOOKS
def test_no_service(
    hook: list[str], policy: str, loop_worker: AgentLoopWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = BaseClient.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "retry_for_s", 0.0)  # instead of ten minutes
    config = _config(policy, *hook, *_kwargs(url=f"http://127.0.0.1:{free_port()}"))
    results = _run(config, loop_worker, rollouts()[:2])
    assert [type(result) for result in results] == [TransportError] * 2


@pytest.mark.usefixtures("environment")
def test_function_needs_the_prompt(policy: str, loop_worker: AgentLoopWorker) -> None:
    """verl's trainer, unlike its older one, does not pass it: it must be in the data set."""
    batch = _batch(loop_worker, rollouts()[:1])
    batch.non_tensor_batch["extra_info"] = np.array([{}])
    [error] = asyncio.run(_results(_config(policy, *FUNCTION), loop_worker.tokenizer, batch))
    assert isinstance(error, ValueError)
    assert "raw_prompt" in str(error)


@pytest.mark.parametrize("given", [{"x": 1}, '{"x": 1}'])
def test_the_functions_prompt_is_the_policys(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments of the chat template are an option; ids of the prompt are used, if the data set has them."""
    sent: list[Any] = []

    async def stop(_service: Service, own: Sequence[Any]) -> Any:
        sent.extend(own)
        raise InterruptedError

    monkeypatch.setattr(Service, "score", stop)
    messages = np.array([{"role": "user", "content": "page"}], dtype=object)
    for extra in ({"raw_prompt": messages}, {"raw_prompt": messages, "raw_prompt_ids": np.array([1, 2])}):
        with pytest.raises(InterruptedError):
            asyncio.run(compute_score("shop", "x", "{}", extra, chat_template_kwargs=given))
    assert [own.options.given() for own in sent] == [
        {"chat_template_kwargs": {"x": 1}, "continue_final_message": False}
    ] * 2
    assert [own.prompt for own in sent] == [
        [Message(role="user", content="page")],
        TokenIds(token_ids=[1, 2]),
    ]


def test_example_is_a_valid_configuration(tmp_path: Path, policy: str) -> None:
    module, name, *overrides = arguments("verl_grpo.sh", tmp_path)
    assert (module, name) == ("-m", "verl.trainer.main_ppo")
    config = _config(policy, *overrides)
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert isinstance(load_reward_manager(config, None), ShopR1RewardManager)


def _rewards(truths: Sequence[dict[str, Any]]) -> list[float]:
    return [truth["reward"] for truth in truths]


def _approx(expected: Any) -> Any:
    return pytest.approx(expected, rel=0.0, abs=ROUNDING)


def _config(policy: str, *overrides: str) -> Any:
    """verl's own configuration, as changed by its trainer at start."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=list(overrides))
    config.actor_rollout_ref.model.path = policy
    return migrate_legacy_reward_impl(config)


def _kwargs(**options: object) -> list[str]:
    return [f"+reward.custom_reward_function.reward_kwargs.{key}={value}" for key, value in options.items()]


def _with_one_too_long() -> list[Rollout]:
    first, second, third = rollouts()[:3]
    return [first, Rollout(TOO_LONG, second.completion, second.ground_truth), third]


def _run(config: Any, worker: AgentLoopWorker, own: Sequence[Rollout]) -> list[Any]:
    return asyncio.run(_results(config, worker.tokenizer, _batch(worker, own)))


async def _results(config: Any, tokenizer: Any, batch: DataProto) -> list[Any]:
    """Score all rollouts at once like verl's reward worker. verl's managers belong to the running loop."""
    manager = load_reward_manager(config, tokenizer)
    calls = [manager.run_single(batch[i : i + 1]) for i in range(len(batch))]
    return await asyncio.gather(*calls, return_exceptions=True)


def _ids(worker: AgentLoopWorker, rollout: Rollout) -> tuple[list[int], list[int]]:
    tokenizer = worker.tokenizer
    text = tokenizer.apply_chat_template(rollout.prompt, tokenize=False, add_generation_prompt=True)
    completion = tokenizer.encode(rollout.completion, add_special_tokens=False)
    return tokenizer.encode(text, add_special_tokens=False), [*completion, tokenizer.eos_token_id]


def _batch(worker: AgentLoopWorker, own: Sequence[Rollout]) -> DataProto:
    """A batch, padded like by verl's agent loop: prompts on the left, responses on the right."""
    prompts, responses = zip(*(_ids(worker, rollout) for rollout in own), strict=True)
    prompts_, responses_ = _padded(worker, prompts, "left"), _padded(worker, responses, "right")
    mask = torch.cat([prompts_["attention_mask"], responses_["attention_mask"]], dim=1)
    return DataProto.from_dict(
        tensors={
            "prompts": prompts_["input_ids"],
            "responses": responses_["input_ids"],
            "attention_mask": mask,
        },
        non_tensors={name: _objects([_row(r)[name] for r in own]) for name in _row(own[0])},
    )


def _padded(worker: AgentLoopWorker, rows: Sequence[list[int]], side: str) -> dict[str, torch.Tensor]:
    longest = max(len(row) for row in rows) + 3  # so that each row has some padding
    padded = [
        worker._pad_token_ids(row, max_length=longest, padding_side=side, return_attention_mask=True)
        for row in rows
    ]
    return {name: torch.cat([row[name] for row in padded]) for name in ("input_ids", "attention_mask")}


def _row(rollout: Rollout) -> dict[str, Any]:
    return {
        "data_source": "shop",
        "reward_model": {"style": "rule", "ground_truth": rollout.ground_truth},
        "extra_info": {"raw_prompt": rollout.prompt},
    }


def _objects(values: Sequence[Any]) -> Any:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _handed_over(
    workers: RewardLoopManager, worker: AgentLoopWorker, own: Sequence[Rollout]
) -> AgentLoopOutput:
    """Score a finished rollout like verl's agent loop."""
    outputs = []
    for prompt_ids, response_ids in (_ids(worker, rollout) for rollout in own):
        output = AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            response_mask=[1] * len(response_ids),
            metrics=AgentLoopMetrics(),
        )
        outputs.append(output)
    worker.reward_loop_worker_handles = workers.reward_loop_worker_handles
    asyncio.run(worker._compute_score(outputs, kwargs=_row(own[-1])))
    return outputs[-1]
