"""AReaL 1.0: its workflow, reward processes and executor, on a CPU. Completions are prescribed.

Not tested, because it needs a GPU: SGLang or vLLM as the engine, and the training step.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

import pytest
import torch
from areal.api import AsyncRewardWrapper, ModelRequest, ModelResponse
from areal.api.cli_args import GenerationHyperparameters, InferenceEngineConfig
from areal.infra import WorkflowExecutor
from areal.infra.remote_inf_engine import GroupedRolloutWorkflow
from areal.utils import stats_tracker
from areal.utils.dynamic_import import import_from_string
from areal.workflow.rlvr import RLVRWorkflow
from transformers import AutoTokenizer

from shopr1_client.base import BaseClient
from shopr1_client.errors import TransportError, UnscorableError
from tests.integration.trainers.live import LOG_KEYS, ROUNDING, TOO_LONG, Live, Rollout, free_port, rollouts
from tests.integration.trainers.tokenizer import save_tokenizer

FLOAT32 = 1e-6
"""Relative: AReaL stores rewards in float32."""
Make = Callable[[Any], RLVRWorkflow]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("policy")))


@pytest.fixture(autouse=True)
def new_processes() -> Iterator[None]:
    """Stop AReaL's reward processes, which would keep their environment."""
    yield
    AsyncRewardWrapper._atexit_shutdown_all()


def own_workflow(tokenizer: Any) -> RLVRWorkflow:
    """The workflow, built from its path as in AReaL's configuration."""
    workflow = import_from_string("shopr1_client.trainers.areal_workflow.ShopR1Workflow")
    made: RLVRWorkflow = workflow(gconfig=GenerationHyperparameters(), tokenizer=tokenizer)
    return made


def function(tokenizer: Any) -> RLVRWorkflow:
    """AReaL's own workflow, which calls the function in its reward processes."""
    path = "shopr1_client.trainers.areal.reward_fn"
    return RLVRWorkflow(reward_fn=path, gconfig=GenerationHyperparameters(), tokenizer=tokenizer)


HOOKS = pytest.mark.parametrize("make", [own_workflow, function])


class Engine:
    """Returns the recorded completions of each prompt in order."""

    def __init__(self, tokenizer: Any, own: Sequence[Rollout]) -> None:
        self._tokenizer = tokenizer
        self._own = list(own)

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        text = self._tokenizer.decode(request.input_ids)
        rollout = next(r for r in self._own if r.prompt[-1]["content"] in text)
        self._own.remove(rollout)
        ids = _ids(self._tokenizer, rollout)
        return ModelResponse(
            input_tokens=request.input_ids,
            output_tokens=ids,
            output_logprobs=[0.0] * len(ids),
            output_versions=[0] * len(ids),
        )

    def get_version(self) -> int:
        return 0


@HOOKS
@pytest.mark.usefixtures("environment")
def test_rewards_equal_those_of_the_service(make: Make, tokenizer: Any, live: Live) -> None:
    own = rollouts()
    episodes = _run(make(tokenizer), tokenizer, own)
    truths = live.rewards(own)
    assert [episode["rewards"].item() for episode in episodes] == _approx(truths)
    assert len(set(truths)) > 5


@pytest.mark.usefixtures("environment")
def test_function_in_areals_processes(tokenizer: Any, live: Live) -> None:
    """Rewards before AReaL converts them to float32."""
    own = rollouts()[:4]
    truths = pytest.approx(live.rewards(own), rel=0.0, abs=ROUNDING)
    assert asyncio.run(_wrapped(tokenizer, own)) == truths


@pytest.mark.usefixtures("environment")
def test_timeout_in_areals_processes(tokenizer: Any, live: Live) -> None:
    """AReaL uses 0 after a timeout, which includes the wait for a process."""
    own = rollouts()[:2]
    assert 0 not in live.rewards(own)
    assert asyncio.run(_wrapped(tokenizer, own, timeout_seconds=0.001)) == [0, 0]


@pytest.mark.usefixtures("environment")
def test_workflow_logs_the_terms(tokenizer: Any, live: Live) -> None:
    own = rollouts()
    stats_tracker.export_all()
    _run(own_workflow(tokenizer), tokenizer, own)
    exported = stats_tracker.export_all()
    assert {f"rollout/{key}" for key in LOG_KEYS} < set(exported)
    components = [truth["components"] for truth in live.score(own)]
    for name in components[0]:
        mean = fmean(component[name] or 0.0 for component in components)
        assert exported[f"rollout/shopr1/{name}"] == _approx(mean)


@pytest.mark.usefixtures("environment")
def test_executor_rejects_unscorable_rollouts(tokenizer: Any, live: Live) -> None:
    own = _with_one_too_long()
    good, _, also_good = live.rewards(own)
    executor = WorkflowExecutor(
        InferenceEngineConfig(max_concurrent_rollouts=3, consumer_batch_size=3), Engine(tokenizer, own)
    )
    executor.initialize()
    try:
        ids = [executor.submit(_row(rollout), own_workflow(tokenizer)) for rollout in own]
        results = [executor.wait_for_task(task) for task in ids]
    finally:
        executor.destroy()
    assert results[1] is None
    assert [results[i]["rewards"].item() for i in (0, 2)] == _approx([good, also_good])


@pytest.mark.usefixtures("environment")
def test_whole_group_is_rejected(tokenizer: Any) -> None:
    """AReaL normalises slices of the group size: a missing rollout would shift all later groups."""
    good = rollouts()[0]
    endless = json.dumps({"rationale": "mug " * 20_000, "action": {"type": "terminate"}})
    too_long = Rollout(good.prompt, endless, good.ground_truth)
    group = GroupedRolloutWorkflow(own_workflow(tokenizer), 2, logging.getLogger("group"))
    with pytest.raises(UnscorableError, match="sequence_too_long"):
        asyncio.run(group.arun_episode(Engine(tokenizer, [good, too_long]), _row(good)))


@HOOKS
@pytest.mark.usefixtures("environment")
def test_unscorable_rollout(make: Make, tokenizer: Any) -> None:
    with pytest.raises(UnscorableError, match="sequence_too_long"):
        _run(make(tokenizer), tokenizer, _with_one_too_long()[1:2])


@HOOKS
@pytest.mark.usefixtures("environment")
def test_configured_reward_of_an_unscorable_rollout(
    make: Make, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOPR1_CLIENT_UNSCORABLE", "-1.5")
    [episode] = _run(make(tokenizer), tokenizer, _with_one_too_long()[1:2])
    assert episode["rewards"].item() == -1.5


@HOOKS
def test_no_service(make: Make, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = BaseClient.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "retry_for_s", 0.0)  # instead of ten minutes
    monkeypatch.setenv("SHOPR1_CLIENT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TransportError):
        _run(make(tokenizer), tokenizer, rollouts()[:1])


def _run(workflow: RLVRWorkflow, tokenizer: Any, own: Sequence[Rollout]) -> list[dict[str, torch.Tensor]]:
    async def episodes() -> list[dict[str, torch.Tensor]]:
        calls = [workflow.arun_episode(Engine(tokenizer, [rollout]), _row(rollout)) for rollout in own]
        return list(await asyncio.gather(*calls))

    return asyncio.run(episodes())


async def _wrapped(tokenizer: Any, own: Sequence[Rollout], **options: float) -> list[float]:
    """Call the function like AReaL's workflows."""
    call = AsyncRewardWrapper(import_from_string("shopr1_client.trainers.areal.reward_fn"), **options)
    return [
        await call("", "", prompt_ids, _ids(tokenizer, rollout), **_row(rollout))
        for rollout in own
        for prompt_ids in [_prompt_ids(tokenizer, rollout)]
    ]


def _row(rollout: Rollout) -> dict[str, Any]:
    return {"messages": rollout.prompt, "ground_truth": rollout.ground_truth}


def _ids(tokenizer: Any, rollout: Rollout) -> list[int]:
    return [*tokenizer.encode(rollout.completion, add_special_tokens=False), tokenizer.eos_token_id]


def _prompt_ids(tokenizer: Any, rollout: Rollout) -> list[int]:
    text = tokenizer.apply_chat_template(rollout.prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _approx(expected: Any) -> Any:
    return pytest.approx(expected, rel=FLOAT32, abs=ROUNDING)


def _with_one_too_long() -> list[Rollout]:
    first, second, *_, last = rollouts()
    return [first, Rollout(TOO_LONG, second.completion, second.ground_truth), last]
