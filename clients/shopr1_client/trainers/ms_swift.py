"""ms-swift: `--external_plugins /path/to/this/file.py --reward_funcs shop_r1`.

The data set's column `ground_truth` has the human's action, as an object or as a JSON string.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from swift.rewards import AsyncORM, orms

from shopr1_client.grouping import Rollout
from shopr1_client.json_text import read_json
from shopr1_client.trainers.service import Service, arguments, chat
from shopr1_client.wire import Text, TokenIds
from shopr1_client.wire_prompt import PromptOptions

Ids = Sequence[int] | Sequence[Sequence[int]]


class ShopR1(AsyncORM):  # type: ignore[misc]  # checked where there is no ms-swift
    """The reward of each completion."""

    async def __call__(
        self,
        completions: Sequence[str],
        messages: Sequence[Sequence[Mapping[str, Any]]],
        ground_truth: Sequence[Any],
        response_token_ids: Sequence[Ids] | None = None,
        chat_template_kwargs: Sequence[Any] | None = None,
        tools: Sequence[Any] | None = None,
        **columns: Any,  # noqa: ANN401  # the rest of the data set, and of the rollout
    ) -> list[float]:
        """Rewards in the order of the completions, the last message of each conversation.

        Raises:
            UnscorableError: a rollout cannot be scored, and no number is configured for it. ms-swift accepts
                None, but counts it as a reward of 0.
        """
        service = Service.find()
        ids = response_token_ids or [[] for _ in completions]
        none = [None] * len(completions)
        rollouts = [
            Rollout(
                prompt=chat(conversation[:-1]),
                completion=_completion(completions[i], ids[i]),
                ground_truth=truth,
                options=_options((chat_template_kwargs or none)[i], (tools or none)[i]),
            )
            for i, (conversation, truth) in enumerate(zip(messages, ground_truth, strict=True))
        ]
        return service.numbers(await service.score(rollouts))


def _completion(text: str, ids: Ids) -> Text | TokenIds:
    """The sampled ids if available, else the text. Ids of several turns are lists of lists."""
    plain = [token_id for token_id in ids if isinstance(token_id, int)]
    return TokenIds(token_ids=plain) if plain else Text(text=text)


def _options(template_arguments: Any, tools: Any) -> PromptOptions:  # noqa: ANN401  # of a row
    """The row's arguments of the chat template; tools are a list, or one as JSON."""
    tools = read_json(tools) if isinstance(tools, str) and tools else tools
    given = {**arguments(template_arguments), **({"tools": tools} if tools else {})}
    return PromptOptions(chat_template_kwargs=given or None)


orms["shop_r1"] = ShopR1
