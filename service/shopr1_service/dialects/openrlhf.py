"""OpenRLHF: `--reward.remote_url http://host:port/dialects/openrlhf/get_reward`.

Rollouts come one by one, in lists of one. Older releases send lists of many, and some send empty ones to all
URLs but the first. The answer has the form that OpenRLHF's own server gives.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from pydantic import BaseModel, Field

from shopr1_client.reward_logs import PREFIX, log_keys
from shopr1_client.wire_base import UnicodeText
from shopr1_service.dialects import examples
from shopr1_service.dialects.requests import Reading, Rollout, TrainerRequest
from shopr1_service.dialects.results import PROBLEMS, TAG, AppState, Dialect, Outcome, score
from shopr1_service.field_errors import refuse_if_any
from shopr1_service.http.responses import json_response
from shopr1_service.http.state import State

DIALECT = Dialect("openrlhf", timeout_s=170.0)
"""OpenRLHF gives up after 180 s, and asks again."""

router = APIRouter(prefix="/dialects/openrlhf", tags=[TAG])


class GetReward(TrainerRequest):
    """Rollouts as three lists of the same length."""

    query: Annotated[list[str], Field(description="Prompt and completion, special tokens written out.")]
    prompts: Annotated[list[UnicodeText], Field(description="The templated prompts.")]
    labels: Annotated[
        list[Any],
        Field(
            description="Ground truths: an action, `{ground_truth, recipe}`, or either as JSON in a string. "
            'Where one is null or `""`, the label registered for the prompt is taken.'
        ),
    ]


class Rewards(BaseModel):
    """Rewards in the order of the request."""

    rewards: list[float]
    scores: Annotated[
        list[float],
        Field(description="1 where the action is the human's, else 0: what dynamic filtering goes by."),
    ]
    extra_logs: Annotated[
        dict[str, float | list[float]],
        Field(description="The same keys in every answer: a number for one rollout, else a list."),
    ]


@router.post(
    "/get_reward",
    response_model=Rewards,
    operation_id="openrlhfGetReward",
    summary="OpenRLHF's remote reward",
    responses=PROBLEMS,
)
async def get_reward(
    body: Annotated[GetReward, Body(openapi_examples=examples.OPENRLHF)], request: Request, state: AppState
) -> Response:
    """Rewards of rollouts, for `--reward.remote_url`.

    A completion is what follows its prompt in `query`. A rollout that cannot be scored makes the whole answer
    a problem, `unscorable`, unless the service's `openrlhf_unscorable` names a number for it.
    """
    rollouts = _rollouts(body, state)
    outcomes = await score(rollouts, DIALECT, state.settings.openrlhf_unscorable, request, state)
    return json_response(
        {
            "rewards": [outcome.reward for outcome in outcomes],
            "scores": [outcome.logs[f"{PREFIX}exact_match"] for outcome in outcomes],
            "extra_logs": _extra_logs(outcomes, state.recipes.default.components),
        }
    )


def _rollouts(body: GetReward, state: State) -> list[Rollout]:
    reading = Reading(state)
    for name, values in (("prompts", body.prompts), ("labels", body.labels)):
        if len(values) != len(body.query):
            reading.refuse(name, f"{len(values)} items, but query has {len(body.query)}")
    refuse_if_any(reading.errors)
    for i, (query, prompt, label) in enumerate(zip(body.query, body.prompts, body.labels, strict=True)):
        if not query.startswith(prompt):
            reading.refuse(f"query[{i}]", f"does not begin with prompts[{i}]")
            continue
        reading.add(
            prompt,
            query.removeprefix(prompt),
            label,
            prompt_path=f"prompts[{i}]",
            completion_path=f"query[{i}]",
            label_path=f"labels[{i}]",
        )
    return reading.done()


def _extra_logs(outcomes: Sequence[Outcome], components: Sequence[str]) -> dict[str, float | list[float]]:
    # OpenRLHF makes a tensor of [value]: of a number it gets one per sample, like its own entries.
    if len(outcomes) == 1:
        return {**outcomes[0].logs}
    keys = outcomes[0].logs if outcomes else log_keys(components)
    return {key: [outcome.logs[key] for outcome in outcomes] for key in keys}
