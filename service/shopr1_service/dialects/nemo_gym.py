"""NeMo Gym's resources server, under `/dialects/nemo_gym`; verifiers, prime-rl and Axolotl use it too.

`/verify` takes a row of the data set with the policy's response, and returns all of it with the reward. A
rollout that cannot be scored is marked as failed and masked; its reward of 0.0 has no meaning without these
marks. `/aggregate_metrics` computes statistics of every number in the responses of `/verify`, under NeMo
Gym's names and in its groups: `mean/reward`, `max/reward`, … per task and over all rollouts.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from shopr1_client.errors import InternalError, MalformedBodyError, TooLargeError
from shopr1_client.wire_base import IN_PIECES
from shopr1_service.dialects import examples
from shopr1_service.dialects.ground_truth import is_contradiction, is_missing
from shopr1_service.dialects.requests import Paths, Rollout, RolloutReader, TrainerRequest
from shopr1_service.dialects.responses_api import CreateParams, PolicyResponse
from shopr1_service.dialects.results import (
    BODY_PROBLEMS,
    PROBLEMS,
    TAG,
    Dialect,
    TrainerResult,
    score_rollouts,
)
from shopr1_service.field_errors import raise_if_any
from shopr1_service.http.json_body import JsonRoute, beside_loop, raw_body
from shopr1_service.http.problem_responses import problem_responses
from shopr1_service.http.state import AppState, State

DIALECT = Dialect("nemo_gym", timeout_s=55.0)
"""verifiers gives up after 60 s. NeMo Gym itself waits without limit."""

router = APIRouter(prefix="/dialects/nemo_gym", tags=[TAG], route_class=JsonRoute)

_LABEL_FIELDS = ("ground_truth", "expected_answer", "label")
# Fields of an earlier response, which are sent again when a rollout is verified again.
_STALE = ("_ng_failure_class", "_ng_failure_judge_error")

_TASK, _ROLLOUT = "_ng_task_index", "_ng_rollout_index"
_FAILURE = "_ng_failure_class"
_MAX_NUMBERS = 2**20
"""Each number is a part of up to fifteen others in the answer, which is written at once."""
_LARGEST = 1e100  # a larger number is no measurement, and its square could overflow

_Row = Mapping[str, Any]


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
    mask_sample: Annotated[bool, Field(description="The reward has no meaning; leave the rollout out.")]
    failure_kind: str | None
    failure_reason: Annotated[str | None, Field(description="Why the rollout cannot be scored.")]


class VerifyResponses(TrainerRequest):
    """Responses of `/verify`, without their large parts."""

    verify_responses: Annotated[list[dict[str, Any]], IN_PIECES]


class AggregateMetrics(BaseModel):
    """Statistics by name; `key_metrics` are the means over all rollouts."""

    group_level_metrics: list[dict[str, int | float]] = []
    agent_metrics: dict[str, float] = {}
    key_metrics: dict[str, float] = {}


@router.post(
    "/seed_session", operation_id="nemoGymSeedSession", summary="Begin a rollout", responses=BODY_PROBLEMS
)
async def seed_session(
    body: Annotated[dict[str, Any], Body(openapi_examples=examples.NEMO_GYM_ROW)],
) -> dict[str, Any]:
    """Returns `{}`: nothing is kept between the requests of a rollout, and there are no tools."""
    return {}


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
    """The request with `reward`, `reward_components`, and the terms again as numbers at the top level.

    A rollout that cannot be scored has `_ng_failure_class`, `failure_reason` and `mask_sample`, also in
    `instance_config`. With `nemo_gym_unscorable = "error"` it is a problem, `unscorable`, instead.
    """
    echo: dict[str, Any] = raw_body(request)
    await beside_loop(request, partial(_refuse_unless_writable, echo))
    unscorable: float | Literal["error"] = "error" if state.settings.nemo_gym_unscorable == "error" else 0.0
    [result] = await score_rollouts(partial(_rollouts, body, state), DIALECT, unscorable, request, state)
    answer = {key: value for key, value in echo.items() if key not in _STALE} | _verdict(result, echo)
    return await beside_loop(request, partial(_echo, answer))


@router.post(
    "/aggregate_metrics",
    response_model=AggregateMetrics,
    operation_id="nemoGymAggregateMetrics",
    summary="Statistics over rollouts",
    responses=BODY_PROBLEMS,
)
async def aggregate_metrics(
    body: Annotated[VerifyResponses, Body(openapi_examples=examples.NEMO_GYM_METRICS)],
    request: Request,
) -> Response:
    """Mean, maximum, minimum, median and standard deviation of every number, per task and over all.

    Rollouts that could not be scored are left out.
    """
    return await beside_loop(request, partial(_metrics_answer, body.verify_responses))


@router.get(
    "/reverify_mode",
    operation_id="nemoGymReverifyMode",
    summary="Can a rollout be scored again?",
    responses=problem_responses(InternalError),
)
async def reverify_mode() -> Literal["stateless"]:
    """`"stateless"`: it can, at any time."""
    return "stateless"


def _echo(value: Any) -> Response:  # noqa: ANN401  # whatever JSON can hold
    # Not orjson: the request may hold integers of any size and half surrogate pairs, also in names.
    return Response(json.dumps(value, allow_nan=False), media_type="application/json")


def _refuse_unless_writable(echo: object) -> None:
    """Refuse JSON that Python reads but cannot write: `NaN`, `1e999`, and nesting at its limit."""
    try:
        json.dumps(echo, allow_nan=False)
    except ValueError:
        raise_if_any([{"location": "body", "message": "a number that is NaN or beyond a float's range"}])
    except RecursionError:
        raise MalformedBodyError("the body is nested too deeply") from None


def _rollouts(body: VerifyRequest, state: State) -> list[Rollout]:
    reader = RolloutReader(state)
    name, *others = [name for name in _LABEL_FIELDS if not is_missing(getattr(body, name))] or _LABEL_FIELDS
    for other in others:
        if is_contradiction(getattr(body, name), getattr(body, other), state.recipes):
            reader.add_error(other, f"contradicts {name}: it holds another ground truth")
    params, found = body.responses_create_params, body.response.ids
    if found is None:
        _refuse_hidden_tokens(body, reader)
        ids, paths = None, Paths("responses_create_params.input", "response.output", name)
    else:
        item, ids = found
        at = f"response.output[{item}]"
        paths = Paths(f"{at}.prompt_token_ids", f"{at}.generation_token_ids", name)
    label = getattr(body, name)
    reader.add(params.messages(), body.response.text, label, paths, ids=ids, options=params.options())
    return reader.finish()


def _refuse_hidden_tokens(body: VerifyRequest, reader: RolloutReader) -> None:
    """Refuse texts that are not all that the policy saw and sampled."""
    if body.responses_create_params.tools:
        message = "not supported without token ids: the prompt would not be the one the policy saw"
        reader.add_error("responses_create_params.tools", message)
    if body.response.reasoning is not None:
        message = "not supported without token ids: the text is not all that the policy sampled"
        reader.add_error(f"response.output[{body.response.reasoning}].type", message)


def _verdict(result: TrainerResult, echo: dict[str, Any]) -> dict[str, Any]:
    verdict: dict[str, Any] = {
        "reward": result.reward,
        "reward_components": result.terms,
        "mask_sample": False,
        "failure_kind": None,
        "failure_reason": None,
        **result.logs,
    }
    if result.failure is None:
        return verdict
    config = echo.get("instance_config")
    return verdict | {
        "reward_components": dict.fromkeys(result.terms, 0.0),  # NeMo-RL requires the reward as their sum
        "mask_sample": True,
        "failure_kind": "verifier_error",  # one of NeMo Gym's kinds
        "failure_reason": result.failure,
        "_ng_failure_class": "unscorable",
        # For releases that have no `mask_sample` at the top level.
        "instance_config": {**(config if isinstance(config, dict) else {}), "mask_sample": True},
    }


# --- /aggregate_metrics -----------------------------------------------------------------------------


def _metrics_answer(rollouts: Sequence[_Row]) -> Response:
    num_numbers = sum(len(_numbers(rollout)) for rollout in rollouts)
    if num_numbers > _MAX_NUMBERS:
        message = f"{num_numbers} numbers, at most {_MAX_NUMBERS}"
        raise_if_any([{"location": "verify_responses", "message": message}], TooLargeError)
    return _echo(_aggregate(rollouts).model_dump())


def _aggregate(rollouts: Sequence[_Row]) -> AggregateMetrics:
    """Statistics per task and over all rollouts, except those that are marked as failed."""
    scored = [rollout for rollout in rollouts if rollout.get(_FAILURE) is None]
    tasks: dict[int, list[_Row]] = {}
    for rollout in scored:
        tasks.setdefault(_task(rollout), []).append(rollout)
    metrics = _metrics(scored)
    return AggregateMetrics(
        group_level_metrics=[{**_metrics(tasks[task]), _TASK: task} for task in sorted(tasks)],
        agent_metrics=metrics,
        key_metrics={name: value for name, value in metrics.items() if name.startswith("mean/")},
    )


def _task(rollout: _Row) -> int:
    task = rollout.get(_TASK, 0)
    return task if isinstance(task, int) else 0


def _metrics(rollouts: Sequence[_Row]) -> dict[str, float]:
    columns: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in _numbers(rollout).items():
            columns.setdefault(name, []).append(value)
    return {
        f"{statistic}/{name}": compute(values)
        for name, values in columns.items()
        for statistic, compute in _STATISTICS.items()
    }


def _numbers(rollout: _Row) -> dict[str, float]:
    response = rollout.get("response")
    usage = response.get("usage") if isinstance(response, dict) else None
    return {
        name: float(value)
        for name, value in {**rollout, **(usage if isinstance(usage, dict) else {})}.items()
        if isinstance(value, int | float) and abs(value) <= _LARGEST and name not in (_TASK, _ROLLOUT)
    }


def _std(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for one value, as NeMo Gym defines it."""
    if len(values) < 2:
        return 0.0
    mean = statistics.fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


_STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "max": max,
    "min": min,
    "median": statistics.median,
    "std": _std,
}
