"""verl: a `custom_reward_function`, called with the text of a rollout.

Prefer the reward manager (`verl_manager.py`), which has the prompt and the token ids. For the options in
`reward_kwargs` see `Service`.
"""

from typing import Any

from shopr1_client.grouping import Rollout
from shopr1_client.reward_logs import log_values
from shopr1_client.trainers.service import Service, arguments, chat, listed_ids
from shopr1_client.wire import Message, Reward, TokenIds
from shopr1_client.wire_prompt import PromptOptions

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
    chat_template_kwargs: Any = None,  # noqa: ANN401
    **options: Any,  # noqa: ANN401  # what later releases add
) -> ScoreAndLogs:
    """`score`, and the values of `log_values`.

    Args:
        chat_template_kwargs: verl's `data.apply_chat_template_kwargs`, an object or one as JSON.

    Raises:
        ValueError: `extra_info` has neither `raw_prompt_ids` nor `raw_prompt`.
        UnscorableError: the rollout cannot be scored, and no number is configured for it.
    """
    service = Service.find(url, api_key, recipe, unscorable)
    # verl adds a generation prompt to all messages.
    prompt_options = PromptOptions(
        chat_template_kwargs=arguments(chat_template_kwargs) or None, continue_final_message=False
    )
    rollout = Rollout(
        prompt=_prompt(extra_info or {}),
        completion=solution_str,
        ground_truth=ground_truth,
        options=prompt_options,
    )
    return score_and_logs(service, (await service.score([rollout]))[0])


def score_and_logs(service: Service, reward: Reward) -> ScoreAndLogs:
    """The result of a rollout for verl."""
    return {"score": service.numbers([reward])[0], **log_values(reward)}


def _prompt(extra_info: dict[str, Any]) -> list[Message] | TokenIds:
    ids = listed_ids(extra_info.get("raw_prompt_ids"))
    if ids is not None:
        return ids
    messages = extra_info.get("raw_prompt")
    if messages is None:  # verl's own trainer passes no prompt to a reward function
        raise ValueError(
            "extra_info has no raw_prompt: add the prompt's messages to the data set, "
            "or use the reward manager, which needs none"
        )
    return chat(messages)
