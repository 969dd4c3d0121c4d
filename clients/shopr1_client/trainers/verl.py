"""verl: a `custom_reward_function`, called for one rollout with its text.

Better is the reward manager (`verl_manager.py`): it has the prompt and the token ids. Options in
`reward_kwargs`: see `Service`.
"""

from typing import Any

from shopr1_client.grouping import Rollout
from shopr1_client.reward_logs import log_values
from shopr1_client.trainers.service import Service, chat
from shopr1_client.wire import Message, Reward

ScoreAndLogs = dict[str, float]


async def compute_score(
    data_source: Any,  # noqa: ANN401  # verl's
    solution_str: str,
    ground_truth: Any,  # noqa: ANN401
    extra_info: dict[str, Any] | None = None,
    *,
    url: str | None = None,
    api_key: str | None = None,
    recipe: str | None = None,
    unscorable: float | None = None,
    **options: Any,  # noqa: ANN401  # what later releases add
) -> ScoreAndLogs:
    """`score`, and the same numbers under the same keys for every rollout.

    Raises:
        ValueError: `extra_info` has no `raw_prompt`.
        UnscorableError: the rollout cannot be scored, and no number may stand for its reward.
    """
    service = Service.find(url, api_key, recipe, unscorable)
    rollout = Rollout(
        prompt=_prompt(extra_info or {}), completion=solution_str, ground_truth=plain(ground_truth)
    )
    return told(service, (await service.score([rollout]))[0])


def told(service: Service, reward: Reward) -> ScoreAndLogs:
    """What verl gets for a rollout."""
    return {"score": service.numbers([reward])[0], **log_values(reward)}


def plain(value: Any) -> Any:  # noqa: ANN401
    """A value out of a numpy array or a parquet file as JSON has it."""
    if isinstance(value, dict):
        # Columns of objects have the keys of all rows, with None where a row has none.
        return {key: plain(item) for key, item in value.items() if item is not None}
    return value.item() if hasattr(value, "item") else value


def _prompt(extra_info: dict[str, Any]) -> list[Message]:
    messages = extra_info.get("raw_prompt")
    if messages is None:  # verl's own trainer tells a reward function no prompt
        raise ValueError(
            "extra_info has no raw_prompt: let the data set have the prompt's messages there, "
            "or take the reward manager, which needs none"
        )
    return chat(messages)
