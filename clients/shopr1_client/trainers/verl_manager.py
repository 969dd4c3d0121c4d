"""verl's reward manager for the service: sends token ids, and one request for rollouts that end together."""

import asyncio
from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from shopr1_client.grouping import Rollout
from shopr1_client.trainers.service import Service
from shopr1_client.trainers.verl import ScoreAndLogs, score_and_logs
from shopr1_client.wire import Reward, TokenIds

WINDOW_S = 0.01
"""How long the first rollout of a request waits for others."""


class ShopR1RewardManager(RewardManagerBase):  # type: ignore[misc]  # checked where there is no verl
    """`reward.reward_manager.source=importlib`, see docs/trainers/verl.md. Options in `reward_kwargs`."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **router: Any) -> None:  # noqa: ANN401
        super().__init__(config, tokenizer, compute_score)
        self._service = Service.find(**_options(config))
        self._waiting: list[tuple[Rollout, asyncio.Future[Reward]]] = []
        self._requests: set[asyncio.Task[None]] = set()  # the loop alone does not keep a task alive

    async def run_single(self, data: Any) -> dict[str, Any]:  # noqa: ANN401  # a DataProto
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reward] = loop.create_future()
        self._waiting.append((_rollout(data[-1:][0]), future))
        if len(self._waiting) == 1:
            loop.call_later(WINDOW_S, self._send)
        # An unscorable rollout fails alone; the others of its request get their rewards.
        scores: ScoreAndLogs = score_and_logs(self._service, await future)
        return {"reward_score": scores["score"], "reward_extra_info": scores}

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        request = asyncio.ensure_future(self._score(waiting))
        self._requests.add(request)
        request.add_done_callback(self._requests.discard)

    async def _score(self, waiting: list[tuple[Rollout, "asyncio.Future[Reward]"]]) -> None:
        rollouts, futures = zip(*waiting, strict=True)
        try:
            rewards = await self._service.score(rollouts)
        except Exception as error:  # every waiting rollout gets it
            for future in futures:
                if not future.done():  # verl may have given up
                    future.set_exception(error)
        else:
            for future, reward in zip(futures, rewards, strict=True):
                if not future.done():
                    future.set_result(reward)


def _options(config: Any) -> dict[str, Any]:  # noqa: ANN401
    function = config.reward.get("custom_reward_function") or {}
    return dict(function.get("reward_kwargs") or {})


def _rollout(item: Any) -> Rollout:  # noqa: ANN401  # a DataProtoItem
    prompt_T, response_T, mask_T = (item.batch[name] for name in ("prompts", "responses", "attention_mask"))
    columns = item.non_tensor_batch
    if "prompt_len" in columns:  # while others are generated: padded on the right, the mask of both as one
        prompt, response = prompt_T[: columns["prompt_len"]], response_T[: columns["response_len"]]
    else:  # a whole batch: prompts padded on the left, responses on the right
        mask_prompt, mask_response = mask_T.bool().split([len(prompt_T), len(response_T)])
        prompt, response = prompt_T[mask_prompt], response_T[mask_response]
    return Rollout(
        prompt=TokenIds(token_ids=prompt.tolist()),
        completion=TokenIds(token_ids=response.tolist()),
        ground_truth=columns["reward_model"]["ground_truth"],
    )
