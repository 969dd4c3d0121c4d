"""NeMo Gym's resources server, under `/dialects/nemo_gym`; verifiers, prime-rl and Axolotl speak it too.

`/verify` gets a row of the data set with the policy's response in it, and answers with all of it and the
reward. A rollout that cannot be scored has a channel of its own: it is marked as failed and masked, and its
reward of 0.0 is not to be read without these marks.
"""

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from shopr1_client.errors import (
    FieldError,
    InternalError,
    InvalidRequestError,
    MalformedBodyError,
)
from shopr1_service.dialects import examples
from shopr1_service.dialects.ground_truth import is_missing
from shopr1_service.dialects.nemo_gym_metrics import AggregateMetrics, aggregate
from shopr1_service.dialects.requests import Reading, Rollout, TrainerRequest
from shopr1_service.dialects.responses_api import CreateParams, PolicyResponse
from shopr1_service.dialects.results import BODY_PROBLEMS, PROBLEMS, TAG, AppState, Dialect, Outcome, score
from shopr1_service.http.problem_responses import problem_responses
from shopr1_service.http.responses import json_response
from shopr1_service.http.state import State

DIALECT = Dialect("nemo_gym", timeout_s=55.0)
"""verifiers gives up after 60 s. NeMo Gym itself waits for ever."""

router = APIRouter(prefix="/dialects/nemo_gym", tags=[TAG])

_LABEL_FIELDS = ("ground_truth", "expected_answer", "label")
# Of an earlier answer, which comes back when a rollout is verified again.
_STALE = ("_ng_failure_class", "_ng_failure_judge_error")


class VerifyRequest(TrainerRequest):
    """A row of the data set with the policy's response. All of it is echoed."""

    responses_create_params: CreateParams
    response: PolicyResponse
    ground_truth: Annotated[
        Any,
        Field(
            description="An action, `{ground_truth, recipe}`, or either as JSON in a string. Without it: "
            "`expected_answer`, `label`, and then what is registered for the prompt's messages."
        ),
    ] = None
    expected_answer: Any = None
    label: Any = None


class VerifyAnswer(BaseModel):
    """The request, and these fields."""

    model_config = ConfigDict(extra="allow")

    responses_create_params: dict[str, Any]
    response: dict[str, Any]
    reward: float
    reward_components: Annotated[dict[str, float], Field(description="Weighted: they sum to the reward.")]
    mask_sample: Annotated[bool, Field(description="The reward is no measurement; leave the rollout out.")]
    failure_kind: str | None
    failure_reason: Annotated[str | None, Field(description="Why the rollout cannot be scored.")]


class VerifyResponses(TrainerRequest):
    """Answers of `/verify`, less their heavy parts."""

    verify_responses: list[dict[str, Any]]


@router.post(
    "/seed_session",
    response_model=dict[str, Any],
    operation_id="nemoGymSeedSession",
    summary="Begin a rollout",
    responses=BODY_PROBLEMS,
)
async def seed_session(
    body: Annotated[dict[str, Any], Body(openapi_examples=examples.NEMO_GYM_ROW)],
) -> Response:
    """Answers `{}`: nothing is kept between the requests of a rollout, and there are no tools."""
    return json_response({})


@router.post(
    "/verify",
    response_model=VerifyAnswer,
    operation_id="nemoGymVerify",
    summary="Score a rollout",
    responses=PROBLEMS,
)
async def verify(
    body: Annotated[VerifyRequest, Body(openapi_examples=examples.NEMO_GYM_VERIFY)],
    request: Request,
    state: AppState,
) -> Response:
    """The request with `reward`, `reward_components`, and the terms once more as numbers at the top.

    A rollout that cannot be scored has `_ng_failure_class`, `failure_reason` and `mask_sample`, also in
    `instance_config`. With `nemo_gym_unscorable = "error"` it is a problem, `unscorable`, instead.
    """
    echo: dict[str, Any] = await request.json()
    _refuse_unless_writable(echo)
    unscorable: float | Literal["error"] = "error" if state.settings.nemo_gym_unscorable == "error" else 0.0
    [outcome] = await score(_rollouts(body, state), DIALECT, unscorable, request, state)
    answer = {key: value for key, value in echo.items() if key not in _STALE} | _verdict(outcome, echo)
    return _echoing(answer)


@router.post(
    "/aggregate_metrics",
    response_model=AggregateMetrics,
    operation_id="nemoGymAggregateMetrics",
    summary="Statistics over rollouts",
    responses=BODY_PROBLEMS,
)
async def aggregate_metrics(
    body: Annotated[VerifyResponses, Body(openapi_examples=examples.NEMO_GYM_METRICS)],
) -> Response:
    """Mean, maximum, minimum, median and standard deviation of every number, per task and in all.

    Rollouts that could not be scored are left out.
    """
    return _echoing(aggregate(body.verify_responses).model_dump())


@router.get(
    "/reverify_mode",
    response_model=Literal["stateless"],
    operation_id="nemoGymReverifyMode",
    summary="Can a rollout be scored again?",
    responses=problem_responses(InternalError),
)
async def reverify_mode() -> Response:
    """`"stateless"`: it can, at any time."""
    return json_response("stateless")


def _echoing(value: Any) -> Response:  # noqa: ANN401  # whatever JSON can hold
    # Not orjson: strangers' JSON holds integers of any size and half surrogate pairs, also in names.
    return Response(json.dumps(value, allow_nan=False), media_type="application/json")


def _refuse_unless_writable(echo: object) -> None:
    """Python reads what it cannot write again: `NaN`, `1e999`, and what is nested just deep enough."""
    try:
        json.dumps(echo, allow_nan=False)
    except ValueError:
        flaw: FieldError = {"location": "body", "message": "a number that is NaN or beyond a float's range"}
        raise InvalidRequestError(f"body: {flaw['message']}", errors=[flaw]) from None
    except RecursionError:
        raise MalformedBodyError("the body is nested too deeply") from None


def _rollouts(body: VerifyRequest, state: State) -> list[Rollout]:
    reading = Reading(state)
    name = next((name for name in _LABEL_FIELDS if not is_missing(getattr(body, name))), _LABEL_FIELDS[0])
    reading.add(
        body.responses_create_params.messages(),
        body.response.text,
        getattr(body, name),
        prompt_path="responses_create_params.input",
        completion_path="response.output",
        label_path=name,
    )
    return reading.done()


def _verdict(outcome: Outcome, echo: dict[str, Any]) -> dict[str, Any]:
    verdict: dict[str, Any] = {
        "reward": outcome.reward,
        "reward_components": outcome.terms,
        "mask_sample": False,
        "failure_kind": None,
        "failure_reason": None,
        **outcome.logs,
    }
    if outcome.failure is None:
        return verdict
    config = echo.get("instance_config")
    return verdict | {
        "reward_components": dict.fromkeys(outcome.terms, 0.0),  # NeMo-RL demands the reward as their sum
        "mask_sample": True,
        "failure_kind": "verifier_error",  # of NeMo Gym's vocabulary
        "failure_reason": outcome.failure,
        "_ng_failure_class": "unscorable",
        # Where releases look that have no `mask_sample` at the top.
        "instance_config": {**(config if isinstance(config, dict) else {}), "mask_sample": True},
    }
