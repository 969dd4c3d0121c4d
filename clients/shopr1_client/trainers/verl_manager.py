"""verl's reward manager for the service: token ids, and one request for rollouts that end together."""

import asyncio
from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from shopr1_client.rollouts import Rollout
from shopr1_client.trainers.service import Service
from shopr1_client.trainers.verl import ScoreAndLogs, plain, told
from shopr1_client.wire import TokenIds

WINDOW_S = 0.01
"""How long the first rollout of a request waits for others."""


class ShopR1RewardManager(RewardManagerBase):  # type: ignore[misc]  # checked where there is no verl
    """`reward.reward_manager.source=importlib`, see docs/trainers/verl.md. Options in `reward_kwargs`."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **router: Any) -> None:  # noqa: ANN401
        super().__init__(config, tokenizer, compute_score)
        self._service = Service.find(**_options(config))
        self._waiting: list[tuple[Rollout, asyncio.Future[ScoreAndLogs]]] = []

    async def run_single(self, data: Any) -> dict[str, Any]:  # noqa: ANN401  # a DataProto
        future: asyncio.Future[ScoreAndLogs] = asyncio.get_running_loop().create_future()
        self._waiting.append((_rollout(data[-1]), future))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_later(WINDOW_S, self._send)
        told_of_it = await future
        return {"reward_score": told_of_it["score"], "reward_extra_info": told_of_it}

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._task = asyncio.ensure_future(self._score(waiting))

    async def _score(self, waiting: list[tuple[Rollout, "asyncio.Future[ScoreAndLogs]"]]) -> None:
        rollouts, futures = zip(*waiting, strict=True)
        try:
            results = told(self._service, await self._service.score(rollouts))
        except Exception as error:  # each who waits has to hear of it
            for future in futures:
                if not future.done():  # verl may have given up
                    future.set_exception(error)
        else:
            for future, result in zip(futures, results, strict=True):
                if not future.done():
                    future.set_result(result)


def _options(config: Any) -> dict[str, Any]:  # noqa: ANN401
    function = config.reward.get("custom_reward_function") or {}
    return dict(function.get("reward_kwargs") or {})


def _rollout(item: Any) -> Rollout:  # noqa: ANN401  # a DataProtoItem; the prompt is padded on the left
    prompt_T, response_T, mask_T = (item.batch[name] for name in ("prompts", "responses", "attention_mask"))
    num_prompt_places = len(prompt_T)
    return Rollout(
        prompt=TokenIds(token_ids=prompt_T[mask_T[:num_prompt_places].bool()].tolist()),
        completion=TokenIds(token_ids=response_T[mask_T[num_prompt_places:].bool()].tolist()),
        ground_truth=plain(item.non_tensor_batch["reward_model"]["ground_truth"]),
    )
