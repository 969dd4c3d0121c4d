"""AReaL: `reward_fn="shopr1_client.trainers.areal.reward_fn"`. Runs in AReaL's worker processes.

AReaL gives up after 15 s, asks again three times, and then takes 0 for the reward: raise `timeout_seconds`.
"""

from collections.abc import Sequence
from typing import Any

from shopr1_client.rollouts import Rollout
from shopr1_client.trainers.service import Service
from shopr1_client.wire import TokenIds


def reward_fn(
    prompt: str,  # the ids say the same, exactly
    completions: str,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    ground_truth: Any,  # noqa: ANN401
    **row: Any,  # noqa: ANN401
) -> float:
    """The reward of one rollout.

    Args:
        ground_truth: a column of the data set, the human's action, as an object or as JSON in a string.

    Raises:
        UnscorableError: it cannot be scored, and no number may stand for its reward.
    """
    service = Service.find()
    rollout = Rollout(
        prompt=TokenIds(token_ids=list(prompt_ids)),
        completion=TokenIds(token_ids=list(completion_ids)),
        ground_truth=ground_truth,
    )
    return service.numbers(service.score_sync([rollout]))[0]
