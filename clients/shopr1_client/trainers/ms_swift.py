"""ms-swift: `--external_plugins /path/to/this/file.py --reward_funcs shop_r1`.

The data set has a column `ground_truth`: the human's action, as an object or as JSON in a string.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from swift.rewards import AsyncORM, orms

from shopr1_client.rollouts import Rollout
from shopr1_client.trainers.service import Service, chat


class ShopR1(AsyncORM):  # type: ignore[misc]  # checked where there is no ms-swift
    """The reward of each completion; None where it cannot be scored, which ms-swift leaves out."""

    async def __call__(
        self,
        completions: Sequence[str],
        messages: Sequence[Sequence[Mapping[str, Any]]],
        ground_truth: Sequence[Any],
        **columns: Any,  # noqa: ANN401  # the rest of the data set, and of the rollout
    ) -> list[float | None]:
        rollouts = [
            # The last message is the completion.
            Rollout(prompt=chat(conversation[:-1]), completion=completion, ground_truth=truth)
            for completion, conversation, truth in zip(completions, messages, ground_truth, strict=True)
        ]
        return [reward.reward for reward in await Service.find().score(rollouts)]


orms["shop_r1"] = ShopR1
