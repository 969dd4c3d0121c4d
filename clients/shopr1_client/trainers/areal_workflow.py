"""AReaL's single-turn workflow with rewards from the service: concurrent, without worker processes."""

from collections.abc import Sequence
from typing import Any

from areal import workflow_context
from areal.utils import stats_tracker
from areal.workflow.rlvr import RLVRWorkflow

from shopr1_client.reward_logs import log_values
from shopr1_client.trainers.areal import reward_fn, sampled
from shopr1_client.trainers.service import Service


class ShopR1Workflow(RLVRWorkflow):  # type: ignore[misc]  # checked where there is no AReaL
    """`RLVRWorkflow` with the service's rewards, for a data set with a column `ground_truth`."""

    def __init__(self, gconfig: Any, tokenizer: Any, **options: Any) -> None:  # noqa: ANN401
        super().__init__(reward_fn, gconfig, tokenizer, **options)
        self.async_reward_fn = async_reward_fn


async def async_reward_fn(
    prompt: str,
    completions: str,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    ground_truth: Any,  # noqa: ANN401
    **row: Any,  # noqa: ANN401
) -> float:
    """The reward of one rollout; its terms go to AReaL's statistics.

    Raises:
        UnscorableError: the rollout cannot be scored, and no number is configured; AReaL rejects it.
    """
    service = Service.find()
    rewards = await service.score([sampled(prompt_ids, completion_ids, ground_truth)])
    stats_tracker.get(workflow_context.stat_scope()).scalar(**log_values(rewards[0]))
    return service.numbers(rewards)[0]
