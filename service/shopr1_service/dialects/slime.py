"""slime: `--rm-type remote_rm --rm-url http://host:port/dialects/slime/reward`.

The decoded body of the response is the reward itself: a number, or with `--reward-key reward` an object.
"""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request
from pydantic import Field

from shopr1_client.wire_prompt import PromptOptions
from shopr1_service.dialects import examples
from shopr1_service.dialects.requests import Paths, RolloutReader, TextOrMessages, TrainerRequest
from shopr1_service.dialects.results import PROBLEMS, TAG, Dialect, score_rollouts
from shopr1_service.http.json_body import JsonRoute, beside_loop
from shopr1_service.http.state import AppState

DIALECT = Dialect("slime", timeout_s=110.0)
"""slime gives up after 120 s, and tries again."""

_OPTIONS = PromptOptions(add_special_tokens=False, continue_final_message=False)
"""slime adds a generation prompt to all messages, and tokenises text without special tokens."""

router = APIRouter(prefix="/dialects/slime", tags=[TAG], route_class=JsonRoute)


class RemoteRm(TrainerRequest):
    """One rollout."""

    prompt: Annotated[
        TextOrMessages,
        Field(description="A string is used as it is; messages go through the policy's chat template."),
    ]
    response: str
    label: Annotated[
        Any,
        Field(
            description="The ground truth: an action, `{ground_truth, recipe}`, or either as JSON in a "
            'string. Null or `""`: the label registered for the prompt.'
        ),
    ] = None


@router.post("/reward", operation_id="slimeReward", summary="slime's remote reward", responses=PROBLEMS)
async def reward(
    body: Annotated[RemoteRm, Body(openapi_examples=examples.SLIME)],
    request: Request,
    state: AppState,
    as_object: Annotated[
        bool, Query(alias="object", description="Answer `reward` and its terms as a flat object.")
    ] = False,
) -> float | dict[str, float]:
    """The reward of a rollout, for `--rm-type remote_rm`.

    A rollout that cannot be scored is a problem, `unscorable`, unless the service's `slime_unscorable` names
    a number for it.
    """
    reader = RolloutReader(state)
    paths = Paths("prompt", "response", "label")
    add = partial(reader.add, body.prompt, body.response, body.label, paths, options=_OPTIONS)
    await beside_loop(request, add)
    unscorable = state.settings.slime_unscorable
    [result] = await score_rollouts(reader.finish, DIALECT, unscorable, request, state)
    return {"reward": result.reward, **result.logs} if as_object else result.reward
