"""verl: a `custom_reward_function`, and a reward manager that sends token ids, many rollouts at a time.

`compute_score` is called for one rollout with its text. Options in `reward_kwargs`: see `Service`.
"""

from typing import Any

from shopr1_client.logs import log_values
from shopr1_client.rollouts import Rollout
from shopr1_client.trainers.service import Service, chat
from shopr1_client.wire import Reward

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
        UnscorableError: the rollout cannot be scored, and no number may stand for its reward.
    """
    service = Service.find(url, api_key, recipe, unscorable)
    prompt = chat((extra_info or {})["raw_prompt"])
    rollout = Rollout(prompt=prompt, completion=solution_str, ground_truth=plain(ground_truth))
    return told(service, await service.score([rollout]))[0]


def told(service: Service, rewards: list[Reward]) -> list[ScoreAndLogs]:
    """What verl gets for each rollout."""
    numbers = service.numbers(rewards)
    return [{"score": number, **log_values(reward)} for number, reward in zip(numbers, rewards, strict=True)]


def plain(value: Any) -> Any:  # noqa: ANN401
    """A value out of a numpy array or a parquet file as JSON has it."""
    if isinstance(value, dict):
        # Columns of objects have the keys of all rows, with None where a row has none.
        return {key: plain(item) for key, item in value.items() if item is not None}
    return value.item() if hasattr(value, "item") else value
