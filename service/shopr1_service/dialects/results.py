"""From rollouts to what a trainer is told of each: what the dialects have in common on the way out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Request

from shopr1_client.errors import (
    DeadlineExceededError,
    FieldError,
    InternalError,
    InvalidRequestError,
    MalformedBodyError,
    NotReadyError,
    OverloadedError,
    RequestTimeoutError,
    TooLargeError,
    UnscorableError,
)
from shopr1_client.grouping import Grouping
from shopr1_client.reward_logs import log_values, terms
from shopr1_client.wire import Reward, ScoreRequest
from shopr1_service.dialects.requests import Rollout
from shopr1_service.field_errors import refuse_if_any
from shopr1_service.http.problem_responses import problem_responses
from shopr1_service.http.scoring import answer
from shopr1_service.http.state import State, state_of

TAG = "trainers"
BODY_PROBLEMS = problem_responses(
    MalformedBodyError, RequestTimeoutError, TooLargeError, InvalidRequestError, InternalError
)
PROBLEMS = problem_responses(
    MalformedBodyError,
    RequestTimeoutError,
    TooLargeError,
    InvalidRequestError,
    UnscorableError,
    OverloadedError,
    InternalError,
    NotReadyError,
    DeadlineExceededError,
)
"""Of every route that scores."""

AppState = Annotated[State, Depends(state_of)]

_PROMPT_PATH = re.compile(r"groups\[(\d+)\]\.prompt(.*)")


@dataclass(frozen=True)
class Dialect:
    """A trainer's protocol.

    Attributes:
        name: as it stands in metrics.
        timeout_s: how long the trainer waits, less some seconds for the way; None: as long as it takes.
    """

    name: str
    timeout_s: float | None


@dataclass(frozen=True)
class Outcome:
    """What a trainer is told of a rollout.

    Attributes:
        reward: the reward, or the operator's number where there is none.
        terms: the weighted terms; 0 for one that could not be measured.
        logs: numbers under `log_keys`.
        failure: why the rollout cannot be scored, or None.
    """

    reward: float
    terms: dict[str, float]
    logs: dict[str, float]
    failure: str | None


async def score(
    rollouts: Sequence[Rollout],
    dialect: Dialect,
    unscorable: float | Literal["error"],
    request: Request,
    state: State,
) -> list[Outcome]:
    """What the trainer is told of each rollout, in their order.

    Args:
        unscorable: the number that stands for a reward where there is none, or "error".

    Raises:
        UnscorableError: a rollout has no reward, and no number may stand for it.
        ProblemError: as `answer` raises it, with the paths of the trainer's request.
    """
    rewards = await _rewards(rollouts, dialect, request, state)
    if unscorable == "error":
        _raise_if_unscorable(rewards, rollouts)
        unscorable = 0.0  # stands for nothing: all are scored
    for reward in rewards:
        if reward.reason is not None:
            state.metrics.record_fallback(dialect.name, reward.reason)
    return [
        Outcome(
            reward=unscorable if reward.reward is None else reward.reward,
            terms=terms(reward),
            logs=log_values(reward),
            failure=_failure(reward) if reward.reward is None else None,
        )
        for reward in rewards
    ]


async def _rewards(
    rollouts: Sequence[Rollout], dialect: Dialect, request: Request, state: State
) -> list[Reward]:
    grouping = Grouping(rollouts)
    recipe = rollouts[0].label.recipe if rollouts else None
    body = ScoreRequest(recipe=recipe, groups=grouping.groups)
    try:
        return grouping.in_order(await answer(body, request, state, dialect.timeout_s))
    except InvalidRequestError as error:
        refuse_if_any(_in_trainers_paths(error, grouping.indices, rollouts))
        raise


def _in_trainers_paths(
    error: InvalidRequestError, groups: Sequence[Sequence[int]], rollouts: Sequence[Rollout]
) -> list[FieldError]:
    """A trainer has a prompt per rollout and no groups. Prompts are all that the core can still refuse."""
    return [
        {"location": rollouts[i].prompt_path + match[2], "message": flaw["message"]}
        for flaw in error.errors
        if (match := _PROMPT_PATH.fullmatch(flaw["location"]))
        for i in groups[int(match[1])]
    ]


def _raise_if_unscorable(rewards: Sequence[Reward], rollouts: Sequence[Rollout]) -> None:
    errors: list[FieldError] = [
        {"location": rollout.completion_path, "message": _failure(reward)}
        for rollout, reward in zip(rollouts, rewards, strict=True)
        if reward.reward is None
    ]
    if errors:
        more = f"; and {len(errors) - 1} more" if len(errors) > 1 else ""
        detail = f"{errors[0]['location']}: {errors[0]['message']}{more}"
        raise UnscorableError(detail, errors=errors)


def _failure(reward: Reward) -> str:
    return f"{reward.reason}: {reward.message}"
