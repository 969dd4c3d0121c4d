"""OpenRLHF: `--reward.remote_url http://host:port/dialects/openrlhf/get_reward`.

Rollouts are sent one by one, in lists of one. Older releases send longer lists, and some send empty ones to
all URLs but the first. Releases up to 0.6 decode the rows of a padded batch: `query` begins with padding
tokens. The response has the form of OpenRLHF's own server.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, Field

from shopr1_client.reward_logs import PREFIX, log_keys
from shopr1_client.wire_base import IN_PIECES, UnicodeText
from shopr1_service.dialects import examples
from shopr1_service.dialects.requests import Paths, Rollout, RolloutReader, TrainerRequest
from shopr1_service.dialects.results import PROBLEMS, TAG, Dialect, TrainerResult, score_rollouts
from shopr1_service.field_errors import raise_if_any
from shopr1_service.http.json_body import JsonRoute
from shopr1_service.http.state import AppState, State

DIALECT = Dialect("openrlhf", timeout_s=170.0)
"""OpenRLHF gives up after 180 s, and tries again."""

router = APIRouter(prefix="/dialects/openrlhf", tags=[TAG], route_class=JsonRoute)


class GetReward(TrainerRequest):
    """Rollouts as three lists of the same length."""

    query: Annotated[
        list[str],
        IN_PIECES,
        Field(
            description="Prompt and completion, special tokens written out. Padding before the prompt is "
            "ignored."
        ),
    ]
    prompts: Annotated[list[UnicodeText], IN_PIECES, Field(description="The templated prompts.")]
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
    "/get_reward", operation_id="openrlhfGetReward", summary="OpenRLHF's remote reward", responses=PROBLEMS
)
async def get_reward(
    body: Annotated[GetReward, Body(openapi_examples=examples.OPENRLHF)], request: Request, state: AppState
) -> Rewards:
    """Rewards of rollouts, for `--reward.remote_url`.

    A completion is what follows its prompt in `query`. A rollout that cannot be scored makes the whole answer
    a problem, `unscorable`, unless the service's `openrlhf_unscorable` names a number for it.
    """
    read = partial(_rollouts, body, state)
    results = await score_rollouts(read, DIALECT, state.settings.openrlhf_unscorable, request, state)
    return Rewards(
        rewards=[result.reward for result in results],
        scores=[result.logs[f"{PREFIX}exact_match"] for result in results],
        extra_logs=_extra_logs(results, state.recipes.default.components),
    )


def _rollouts(body: GetReward, state: State) -> list[Rollout]:
    reader = RolloutReader(state)
    for name, values in (("prompts", body.prompts), ("labels", body.labels)):
        if len(values) != len(body.query):
            reader.add_error(name, f"{len(values)} items, but query has {len(body.query)}")
    raise_if_any(reader.errors)
    for i, (query, prompt, label) in enumerate(zip(body.query, body.prompts, body.labels, strict=True)):
        completion = _completion(query, prompt, state)
        if completion is None:
            reader.add_error(f"query[{i}]", f"does not begin with prompts[{i}]")
            continue
        reader.add(prompt, completion, label, Paths(f"prompts[{i}]", f"query[{i}]", f"labels[{i}]"))
    return reader.finish()


def _completion(query: str, prompt: str, state: State) -> str | None:
    """The text after the prompt; None: the query has more before the prompt than padding, or another one."""
    if query.startswith(prompt):
        return query[len(prompt) :]
    padding, start = [token for token in state.engine.codec.end_tokens if token], 0
    # Some tokenizers decode a space after a special token.
    while token := next((t for t in (*padding, *(" " if start else "")) if query.startswith(t, start)), None):
        start += len(token)
        if query.startswith(prompt, start):
            return query[start + len(prompt) :]
    return None


def _extra_logs(
    results: Sequence[TrainerResult], components: Sequence[str]
) -> dict[str, float | list[float]]:
    # OpenRLHF makes a tensor of [value]: from a number it makes one value per sample, like its own entries.
    if len(results) == 1:
        return {**results[0].logs}
    keys = results[0].logs if results else log_keys(components)
    return {key: [result.logs[key] for result in results] for key in keys}
