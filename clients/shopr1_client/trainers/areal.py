"""AReaL: `reward_fn="shopr1_client.trainers.areal.reward_fn"`, in AReaL's worker processes.

Prefer the workflow (`areal_workflow.py`). There are few workers, each scores one rollout after the other, and
AReaL replaces a reward that takes longer than 15 s, in four attempts, by 0.
"""

from collections.abc import Sequence
from typing import Any

from shopr1_client.grouping import Rollout
from shopr1_client.trainers.service import Service
from shopr1_client.wire import TokenIds


def reward_fn(
    prompt: str,
    completions: str,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    ground_truth: Any,  # noqa: ANN401
    **row: Any,  # noqa: ANN401
) -> float:
    """The reward of one rollout.

    Args:
        ground_truth: a column of the data set with the human's action, as an object or as a JSON string.

    Raises:
        UnscorableError: the rollout cannot be scored, and no number is configured for it.
    """
    service = Service.find()
    rewards = service.score_sync([sampled(prompt_ids, completion_ids, ground_truth)])
    return service.numbers(rewards)[0]


def sampled(prompt_ids: Sequence[int], completion_ids: Sequence[int], ground_truth: Any) -> Rollout:  # noqa: ANN401
    """A rollout by its sampled ids; AReaL's texts are only decoded from them."""
    return Rollout(
        prompt=TokenIds(token_ids=list(prompt_ids)),
        completion=TokenIds(token_ids=list(completion_ids)),
        ground_truth=ground_truth,
    )
