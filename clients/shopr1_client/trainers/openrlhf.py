"""OpenRLHF: `--reward.remote_url /path/to/this/file.py`, instead of a URL.

A URL needs no code (docs/trainers/openrlhf.md). This function waits for a service that is overloaded or
restarting, and reports errors in full.
"""

from collections.abc import Sequence
from typing import Any

import torch

from shopr1_client.grouping import Rollout
from shopr1_client.reward_logs import PREFIX, log_values
from shopr1_client.trainers.service import Service
from shopr1_client.wire_prompt import PromptOptions

_AS_TEMPLATED = PromptOptions(add_special_tokens=False)
"""OpenRLHF tokenises its templated prompts without special tokens."""


def reward_func(
    queries: Sequence[str],
    prompts: Sequence[str],
    labels: Sequence[Any],
    **options: Any,  # noqa: ANN401  # what later releases add
) -> dict[str, Any]:
    """Rewards, and in `scores` 1 for actions that equal the human's.

    Args:
        queries: prompt and completion, special tokens written out.
        labels: the human's actions, as objects or as JSON strings.

    Raises:
        UnscorableError: a rollout cannot be scored, and no number is configured for it.
    """
    service = Service.find()
    rollouts = [
        Rollout(
            prompt=prompt, completion=_completion(query, prompt), ground_truth=label, options=_AS_TEMPLATED
        )
        for query, prompt, label in zip(queries, prompts, labels, strict=True)
    ]
    rewards = service.score_sync(rollouts)
    logs = [log_values(reward) for reward in rewards]
    return {
        "rewards": torch.tensor(service.numbers(rewards)),
        "scores": torch.tensor([values[f"{PREFIX}exact_match"] for values in logs]),
        "extra_logs": {key: torch.tensor([values[key] for values in logs]) for key in (logs or [{}])[0]},
    }


def _completion(query: str, prompt: str) -> str:
    if not query.startswith(prompt):
        raise ValueError(f"a query does not begin with its prompt: {query[: len(prompt)]!r}, not {prompt!r}")
    return query.removeprefix(prompt)
