"""TRL's GRPOTrainer and RLOOTrainer, and Unsloth: `reward_funcs=shop_r1_reward`.

The data set's column `ground_truth` has the human's action, as an object or as a JSON string.

Prompts are sent as the token ids that the policy saw: those of a column `policy_prompt_ids` or `prompt_ids`,
else those of the trainer's own tokenisation, with its template, arguments, tools and special tokens. Where
the shim cannot know them, the service tokenises the prompts.

With the callback `PolicyPush` (`callback.py`) the service's policy follows the trainer's. With
`SHOPR1_CLIENT_DEMAND=exact`, rewards of any version but the last one sent are an error.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from shopr1_client.grouping import Rollout
from shopr1_client.reward_logs import log_values
from shopr1_client.trainers.service import Service, arguments, chat, listed_ids, noted_version
from shopr1_client.wire import Reward, TokenIds
from shopr1_client.wire_prompt import PromptOptions

LogMetric = Callable[[str, float], None]

_ID_COLUMNS = ("policy_prompt_ids", "prompt_ids")
"""The first is for a `rollout_func`: TRL hands its further keys to reward functions, but not `prompt_ids`."""


async def shop_r1_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    ground_truth: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    log_metric: LogMetric | None = None,
    trainer_state: Any = None,  # noqa: ANN401  # of transformers
    **columns: Any,  # noqa: ANN401  # the rest of the data set, and what later releases add
) -> list[float | None]:
    """Rewards; for unscorable rollouts None, which TRL excludes from the group, or the configured number."""
    service = Service.find()
    rollouts = _rollouts(prompts, completions, ground_truth, completion_ids, log_metric, columns)
    return _rewards(service, await service.score(rollouts, noted_version(trainer_state)), log_metric)


def shop_r1_reward_sync(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    ground_truth: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    log_metric: LogMetric | None = None,
    trainer_state: Any = None,  # noqa: ANN401  # of transformers
    **columns: Any,  # noqa: ANN401
) -> list[float | None]:
    """`shop_r1_reward` for trainers that do not await."""
    service = Service.find()
    rollouts = _rollouts(prompts, completions, ground_truth, completion_ids, log_metric, columns)
    return _rewards(service, service.score_sync(rollouts, noted_version(trainer_state)), log_metric)


def _rollouts(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    truths: Sequence[Any],
    ids: Sequence[Sequence[int]] | None,
    log_metric: LogMetric | None,
    columns: Mapping[str, Any],
) -> list[Rollout]:
    trainer = getattr(log_metric, "__self__", None)  # TRL's `log_metric` is a method of its trainer
    given_ids = next((columns[name] for name in _ID_COLUMNS if columns.get(name)), None)
    prompt_ids = given_ids or tokenised(prompts, trainer)
    template_arguments = columns.get("chat_template_kwargs") or [None] * len(prompts)
    return [
        Rollout(
            prompt=listed_ids(prompt_ids[i] if prompt_ids else None) or _given(prompt),
            # Sampled ids rather than text, because re-tokenising can give other ids.
            completion=_text(completions[i]) if ids is None else TokenIds(token_ids=list(ids[i])),
            ground_truth=truths[i],
            options=_options(trainer, template_arguments[i]),
        )
        for i, prompt in enumerate(prompts)
    ]


def tokenised(prompts: Sequence[Any], trainer: Any) -> Sequence[Sequence[int]] | None:  # noqa: ANN401
    """The ids that a trainer of TRL 1 makes of prompts, as before it generated.

    None if the trainer is not known, or leaves this to a `rollout_func`.

    Raises:
        ValueError: the prompts have images.
    """
    tokenise = getattr(trainer, "_tokenize_prompts", None)
    if tokenise is None or getattr(trainer, "rollout_func", None) is not None:
        return None
    ids, images, *_ = tokenise(list(prompts))
    if images is not None:
        raise ValueError("the prompts have images, which the service does not see")
    found: Sequence[Sequence[int]] = ids
    return found


def _given(prompt: Any) -> Any:  # noqa: ANN401
    return prompt if isinstance(prompt, str) else chat(prompt)


def _options(trainer: Any, row: Any) -> PromptOptions:  # noqa: ANN401
    """Options as TRL treats prompts: strings get special tokens, messages always a generation prompt."""
    of_trainer = arguments(getattr(trainer, "chat_template_kwargs", None))
    return PromptOptions(
        chat_template_kwargs={**of_trainer, **arguments(row)} or None,
        continue_final_message=False,
        add_special_tokens=True,
    )


def _text(completion: Any) -> str:  # noqa: ANN401  # a string, or the one message of a conversation
    return completion if isinstance(completion, str) else chat(completion)[-1].content


def _rewards(service: Service, rewards: Sequence[Reward], log_metric: LogMetric | None) -> list[float | None]:
    values = [log_values(reward) for reward in rewards]
    if log_metric is not None:
        for key in values[0]:  # the same on every rank, whatever was scored there: TRL gathers by name
            log_metric(key, fmean(value[key] for value in values))
    return [service.unscorable if reward.reward is None else reward.reward for reward in rewards]
