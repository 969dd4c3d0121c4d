"""Routes of the label store, for trainers that send no label with a rollout."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Body, Request
from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError

from shopr1_client.errors import FieldError, InternalError, InvalidRequestError, summary
from shopr1_client.wire import GroundTruth
from shopr1_client.wire_base import IN_PIECES, RequestModel
from shopr1_service.concurrency import checkpoint
from shopr1_service.dialects import examples
from shopr1_service.dialects.ground_truth import LabelError, parse_label
from shopr1_service.dialects.requests import Prompt, TextOrMessages
from shopr1_service.dialects.results import BODY_PROBLEMS, TAG
from shopr1_service.field_errors import raise_if_any
from shopr1_service.http.json_body import JsonRoute, beside_loop
from shopr1_service.http.problem_responses import problem_responses
from shopr1_service.http.state import AppState, State
from shopr1_service.monitoring.logs import current_run
from shopr1_service.scoring.label_store import ContradictionError, Label, NewLabels
from shopr1_service.scoring.recipe_book import RecipeBook

router = APIRouter(tags=[TAG], route_class=JsonRoute)
logger = logging.getLogger(__name__)


def _check_not_empty(prompt: Prompt) -> Prompt:
    # Every text begins with the empty string.
    if not prompt:
        raise PydanticCustomError("empty_prompt", "must not be empty")
    return prompt


class LabelEntry(RequestModel):
    """A ground truth for a prompt."""

    prompt: Annotated[
        TextOrMessages,
        AfterValidator(_check_not_empty),
        Field(description="As the trainer will send it: the templated text, or messages."),
    ]
    ground_truth: Annotated[
        GroundTruth, Field(description="An action, `{ground_truth, recipe}`, or either as JSON in a string.")
    ]


class Labels(RequestModel):
    """Ground truths to register."""

    labels: Annotated[list[LabelEntry], IN_PIECES]


class LabelCount(BaseModel):
    """Number of a run's labels."""

    num_labels: int


@router.put(
    "/labels", operation_id="putLabels", summary="Register ground truths by prompt", responses=BODY_PROBLEMS
)
async def put_labels(
    body: Annotated[Labels, Body(openapi_examples=examples.LABELS)], request: Request, state: AppState
) -> LabelCount:
    """Adds ground truths of the request's run; one for a prompt that is registered replaces the old one.

    Rollouts find the labels of their own run only, and requests without a run those of requests without one.
    Each ground truth is checked against its recipe, and all are registered or none. Two different ones for a
    prompt in one request are refused. They are kept in memory: register them again after a restart.
    """
    new = await beside_loop(request, partial(_checked, body, state.recipes))
    if num_changed := state.labels.put(current_run.get(), new):
        logger.warning("%d prompts that had a label before now have a different one", num_changed)
    return _count(state)


@router.get(
    "/labels",
    operation_id="getLabels",
    summary="How many ground truths are registered",
    responses=problem_responses(InternalError),
)
async def get_labels(state: AppState) -> LabelCount:
    """How many prompts have a registered ground truth in the request's run."""
    return _count(state)


@router.delete(
    "/labels",
    operation_id="deleteLabels",
    summary="Forget the registered ground truths of a run",
    responses=problem_responses(InternalError),
)
async def delete_labels(state: AppState) -> LabelCount:
    """Removes all of the request's run."""
    state.labels.clear(current_run.get())
    return _count(state)


def _count(state: State) -> LabelCount:
    return LabelCount(num_labels=state.labels.num_labels(current_run.get()))


def _checked(body: Labels, recipes: RecipeBook) -> NewLabels:
    labels: list[tuple[Prompt, Label]] = []
    errors: list[FieldError] = []
    for i, entry in enumerate(body.labels):
        checkpoint()
        try:
            labels.append((entry.prompt, parse_label(entry.ground_truth, recipes)))
        except LabelError as error:
            errors.append({"location": f"labels[{i}].ground_truth{error.path}", "message": str(error)})
    raise_if_any(errors)
    try:
        return NewLabels.collect(labels)
    except ContradictionError as error:
        raise InvalidRequestError(summary(errors := _contradiction(labels, error)), errors=errors) from None


def _contradiction(labels: Sequence[tuple[Prompt, Label]], error: ContradictionError) -> list[FieldError]:
    return [
        {
            "location": f"labels[{i}].ground_truth",
            "message": f"{labels[i][1]} contradicts labels[{j}], which has the same prompt",
        }
        for i, j in ((error.first, error.second), (error.second, error.first))
    ]
