"""verifiers and prime-rl: a task with its reward, or a reward for tasks that have a `ground_truth`.

    --env.taskset.task.rewards.shop_r1.fn shopr1_client.trainers.verifiers:shop_r1

adds the reward to an existing taskset. examples/verifiers_env.py is a complete one.
"""

from typing import Any

import verifiers.v1 as vf

from shopr1_client.grouping import Rollout
from shopr1_client.reward_logs import log_values
from shopr1_client.trainers.service import Service, arguments, chat
from shopr1_client.wire import Message, TokenIds
from shopr1_client.wire_prompt import PromptOptions


class ShopR1Data(vf.TaskData):  # type: ignore[misc]  # checked where there is no verifiers
    """A prompt, and the human's action as an object or as a JSON string."""

    ground_truth: dict[str, Any] | str


class ShopR1Task(vf.Task[ShopR1Data]):  # type: ignore[misc]
    """Task with one answer and one reward."""

    @vf.reward  # type: ignore[untyped-decorator]
    async def shop_r1(self, trace: vf.Trace) -> float:
        return await shop_r1(self.data, trace)


async def shop_r1(task: vf.TaskData, trace: vf.Trace) -> float:
    """The reward of a single-turn rollout. The values for the log become metrics of the trace.

    Raises:
        UnscorableError: the rollout cannot be scored, and no number is configured for it.
        ValueError: the trace does not determine prompt and completion.
    """
    service = Service.find()
    rewards = await service.score([_rollout(task, trace)])
    trace.record_metrics(log_values(rewards[0]))  # also of a rollout that fails here
    return service.numbers(rewards)[0]


def _rollout(task: vf.TaskData, trace: vf.Trace) -> Rollout:
    if trace.num_turns != 1 or len(trace.branches) != 1:
        raise ValueError(f"{trace.num_turns} turns in {len(trace.branches)} branches; one turn is scored")
    branch = trace.branches[0]
    prompt, completion = _tokens(branch) if branch.token_ids else _texts(branch)
    return Rollout(
        prompt=prompt, completion=completion, ground_truth=task.ground_truth, options=_options(branch)
    )


def _options(branch: vf.Branch) -> PromptOptions:
    """Options that the client for evaluation sent with the messages, from the sampling settings."""
    sampling = branch.calls[-1].sampling if branch.calls else None
    given = sampling.model_dump() if sampling is not None else {}
    return PromptOptions(
        chat_template_kwargs=arguments(given.get("chat_template_kwargs")) or None,
        continue_final_message=given.get("continue_final_message"),
    )


def _tokens(branch: vf.Branch) -> tuple[TokenIds, TokenIds]:
    """The ids of the training client, exactly as sampled."""
    places = list(zip(branch.token_ids, branch.sampled_mask, strict=True))
    prompt, completion = ([token for token, sampled in places if sampled is own] for own in (False, True))
    return TokenIds(token_ids=prompt), TokenIds(token_ids=completion)


def _texts(branch: vf.Branch) -> tuple[list[Message], str]:
    *prompt, answer = branch.messages
    if answer.reasoning_content or answer.tool_calls:
        raise ValueError("the answer has reasoning or tool calls: its content is not all that was sampled")
    if branch.tools:
        raise ValueError("the harness offers tools: the messages are not all of the prompt")
    return chat(message.model_dump(include={"role", "content"}) for message in prompt), answer.content or ""
