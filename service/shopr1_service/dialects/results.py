"""Scores of rollouts in a trainer's terms: the common output side of the dialects."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from fastapi import Request

from shopr1_client.errors import (
    FieldError,
    InvalidRequestError,
    ProblemError,
    TooLargeError,
    UnscorableError,
)
from shopr1_client.grouping import Grouping
from shopr1_client.reward_logs import log_values, terms
from shopr1_client.wire import ScoreRequest
from shopr1_service.answers import Reward
from shopr1_service.dialects.requests import Rollout
from shopr1_service.field_errors import raise_if_any
from shopr1_service.http.json_body import beside_loop
from shopr1_service.http.problem_responses import BODY, SCORING, problem_responses
from shopr1_service.http.scoring import score_request
from shopr1_service.http.state import State

TAG = "trainers"
BODY_PROBLEMS = problem_responses(*BODY)
PROBLEMS = problem_responses(*SCORING, UnscorableError)
"""Problems of a route that scores."""

_PATH = re.compile(r"groups\[(\d+)\]\.(?:prompt|completions\[(\d+)\])(.*)")


@dataclass(frozen=True)
class Dialect:
    """A trainer's protocol.

    Attributes:
        name: its name in metrics.
        timeout_s: seconds that the trainer waits, less a few for the network; None: without limit.
    """

    name: str
    timeout_s: float | None


@dataclass(frozen=True)
class TrainerResult:
    """The score of a rollout, as a trainer gets it.

    Attributes:
        reward: the reward, or the operator's number where there is none.
        terms: the weighted terms; 0 for one that could not be computed.
        logs: numbers for the trainer's logs, under `log_keys`.
        failure: why the rollout cannot be scored, or None.
    """

    reward: float
    terms: dict[str, float]
    logs: dict[str, float]
    failure: str | None


async def score_rollouts(
    read: Callable[[], Sequence[Rollout]],
    dialect: Dialect,
    unscorable: float | Literal["error"],
    request: Request,
    state: State,
) -> list[TrainerResult]:
    """The result of each rollout, in their order.

    Args:
        read: the rollouts of the trainer's request. Called beside the event loop if its body is large.
        unscorable: the number that replaces a missing reward, or "error".

    Raises:
        UnscorableError: a rollout has no reward, and no number replaces it.
        ProblemError: as `score_request` raises it, with the paths of the trainer's request.
    """
    rollouts = await beside_loop(request, read)
    rewards, is_counted = await _rewards(rollouts, dialect, request, state)
    if unscorable == "error":
        _raise_if_unscorable(rewards, rollouts)
        unscorable = 0.0  # not used: every rollout has a reward
    for reward in rewards:
        if is_counted and reward.reason is not None:
            state.metrics.record_fallback(dialect.name, reward.reason)
    return await beside_loop(request, partial(_results, rewards, unscorable))


def _results(rewards: Sequence[Reward], unscorable: float) -> list[TrainerResult]:
    return [
        TrainerResult(
            reward=unscorable if reward.reward is None else reward.reward,
            terms=terms(reward),
            logs=log_values(reward),
            failure=_failure(reward) if reward.reward is None else None,
        )
        for reward in rewards
    ]


async def _rewards(
    rollouts: Sequence[Rollout], dialect: Dialect, request: Request, state: State
) -> tuple[list[Reward], bool]:
    """Rewards in the order of the rollouts, and whether they were counted."""
    grouping = await beside_loop(request, partial(Grouping, rollouts))
    recipe = rollouts[0].label.recipe if rollouts else None
    body = ScoreRequest(recipe=recipe, groups=grouping.groups)
    try:
        response, is_counted = await score_request(body, request, state, dialect.timeout_s)
        return grouping.in_order(group.rewards for group in response.groups), is_counted
    except (InvalidRequestError, TooLargeError) as error:
        raise_if_any(_in_trainer_paths(error, grouping.indices, rollouts), type(error))
        raise


def _in_trainer_paths(
    error: ProblemError, groups: Sequence[Sequence[int]], rollouts: Sequence[Rollout]
) -> list[FieldError]:
    """Errors at the trainer's own paths: it sends a prompt per rollout."""
    return [
        {"location": location, "message": each["message"]}
        for each in error.errors
        if (match := _PATH.fullmatch(each["location"]))
        for location in _locations(match, groups[int(match[1])], rollouts)
    ]


def _locations(match: "re.Match[str]", group: Sequence[int], rollouts: Sequence[Rollout]) -> Sequence[str]:
    """The trainer's paths of a prompt, one for each rollout of its group, or of a completion."""
    inside = match[3].removeprefix(".token_ids")  # trainers' ids are plain lists
    if match[2] is None:
        return [rollouts[i].paths.prompt + inside for i in group]
    return [rollouts[group[int(match[2])]].paths.completion + inside]


def _raise_if_unscorable(rewards: Sequence[Reward], rollouts: Sequence[Rollout]) -> None:
    errors: list[FieldError] = [
        {"location": rollout.paths.completion, "message": _failure(reward)}
        for rollout, reward in zip(rollouts, rewards, strict=True)
        if reward.reward is None
    ]
    if errors:
        more = f"; and {len(errors) - 1} more" if len(errors) > 1 else ""
        detail = f"{errors[0]['location']}: {errors[0]['message']}{more}"
        raise UnscorableError(detail, errors=errors)


def _failure(reward: Reward) -> str:
    return f"{reward.reason}: {reward.message}"
