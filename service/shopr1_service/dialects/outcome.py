"""From rollouts to what a trainer is told of each: what the dialects have in common on the way out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from fastapi import Depends, Request, Response

from shopr1_client.errors import (
    DeadlineExceededError,
    FieldError,
    InternalError,
    InvalidRequestError,
    MalformedBodyError,
    NotReadyError,
    OverloadedError,
    TooLargeError,
    UnscorableError,
)
from shopr1_client.wire import Components, Group, Reward, ScoreRequest
from shopr1_service.answer import answer
from shopr1_service.dialects.reading import Rollout
from shopr1_service.label_table import Label, prompt_digest
from shopr1_service.openapi import problem_responses
from shopr1_service.preparation import refuse_if_any
from shopr1_service.state import State, state_of

TAG = "trainers"
PROBLEMS = problem_responses(
    MalformedBodyError,
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

PREFIX = "shopr1/"
"""Before every key that goes into a trainer's log, where others have theirs."""
LOG_KEYS = tuple(
    PREFIX + name
    for name in (
        *Components.model_fields,
        "self_certainty_nats",
        "has_self_certainty",
        "format_ok",
        "type_match",
        "exact_match",
        "num_rationale_tokens",
        "unscorable",
    )
)
"""The same for every rollout, scored or not: trainers read a batch by the keys of its first sample."""

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
        terms: the weighted terms; 0 for the one that could not be measured.
        logs: numbers under `LOG_KEYS`.
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
            terms=_terms(reward),
            logs=_logs(reward, rollout.label.action_type),
            failure=_failure(reward) if reward.reward is None else None,
        )
        for rollout, reward in zip(rollouts, rewards, strict=True)
    ]


async def _rewards(
    rollouts: Sequence[Rollout], dialect: Dialect, request: Request, state: State
) -> list[Reward]:
    groups = _grouped(rollouts)
    body = ScoreRequest(
        recipe=rollouts[0].label.recipe if rollouts else None,
        groups=[_group([rollouts[i] for i in indices]) for indices in groups],
    )
    try:
        answered = await answer(body, request, state, dialect.timeout_s)
    except InvalidRequestError as error:
        refuse_if_any(_in_trainers_paths(error, groups, rollouts))
        raise
    rewards = {
        i: reward
        for indices, group in zip(groups, answered.groups, strict=True)
        for i, reward in zip(indices, group.rewards, strict=True)
    }
    return [rewards[i] for i in range(len(rollouts))]


def _grouped(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Indices of the rollouts that have prompt and ground truth in common, which are computed once."""
    groups: dict[tuple[bytes, Label], list[int]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault((prompt_digest(rollout.prompt), rollout.label), []).append(i)
    return list(groups.values())


def _group(rollouts: Sequence[Rollout]) -> Group:
    return Group(
        prompt=rollouts[0].prompt,
        ground_truth=rollouts[0].label.truth,
        completions=[rollout.completion for rollout in rollouts],
    )


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


def _terms(reward: Reward) -> dict[str, float]:
    return {name: 0.0 if value is None else value for name, value in reward.components}


def _logs(reward: Reward, true_type: str) -> dict[str, float]:
    details = reward.details
    nats, predicted = details.self_certainty_nats, details.predicted_action
    values = (
        *_terms(reward).values(),
        0.0 if nats is None else nats,
        nats is not None,
        details.format_error is None,
        predicted is not None and predicted["type"] == true_type,
        details.exact_match,
        details.num_rationale_tokens,
        reward.reward is None,
    )
    return {key: float(value) for key, value in zip(LOG_KEYS, values, strict=True)}


def json_response(value: Any) -> Response:  # noqa: ANN401  # whatever JSON can hold
    """An answer that was validated where it was built; FastAPI would validate it once more."""
    return Response(orjson.dumps(value), media_type="application/json")
