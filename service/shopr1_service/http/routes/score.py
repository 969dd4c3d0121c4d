"""The HTTP routes. Each hands over to the scoring core and says nothing of its own."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Body, Header, Request, Response

from shopr1_client.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    MalformedBodyError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    PolicyVersionError,
    RequestTimeoutError,
    TooLargeError,
)
from shopr1_client.wire import Info, RecipeRef, ScoreRequest, ScoreResponse
from shopr1_rewards import Recipe
from shopr1_service import __version__
from shopr1_service.http import examples
from shopr1_service.http.openapi import METRICS_CONTENT
from shopr1_service.http.problem_responses import problem_responses
from shopr1_service.http.responses import json_answer
from shopr1_service.http.scoring import answer
from shopr1_service.http.state import AppState
from shopr1_service.monitoring.metrics import CONTENT_TYPE_LATEST
from shopr1_service.scoring.recipe_book import reference

router = APIRouter()

TIMEOUT = Header(
    alias="X-Request-Timeout",
    gt=0,
    allow_inf_nan=False,
    description="Seconds after which the client will not wait any more; the service answers 504 then. "
    "At most, and by default, the service's `request_timeout_s`.",
)


@router.post(
    "/score",
    response_model=ScoreResponse,
    operation_id="score",
    tags=["score"],
    summary="Score groups of rollouts",
    responses=problem_responses(
        MalformedBodyError,
        RequestTimeoutError,
        PolicyVersionError,
        TooLargeError,
        InvalidRequestError,
        OverloadedError,
        InternalError,
        NotReadyError,
        DeadlineExceededError,
    ),
)
async def score(
    body: Annotated[ScoreRequest, Body(openapi_examples=examples.SCORE_REQUESTS)],
    request: Request,
    state: AppState,
    timeout_s: Annotated[float | None, TIMEOUT] = None,
) -> Response:
    """Rewards of every completion, in the order of the request, each with its weighted terms.

    A completion that is not valid JSON is scored 0 and says why. One that cannot be scored has
    `reward: null`, `status: unscorable` and a reason: it is never given a 0 or NaN.
    """
    return json_answer(await answer(body, request, state, timeout_s))


@router.get(
    "/info",
    response_model=Info,
    operation_id="info",
    tags=["service"],
    summary="Policy, limits and recipes",
    responses=problem_responses(InternalError, NotReadyError),
)
async def info(state: AppState) -> Response:
    """What is loaded, how it computes, and what a request may hold."""
    answer = Info(
        version=__version__,
        policy=state.engine.info,
        limits=state.settings.limits,
        default_recipe=reference(state.recipes.default),
        recipes=[reference(recipe) for recipe in state.recipes],
    )
    return json_answer(answer)


@router.get(
    "/recipes",
    response_model=list[RecipeRef],
    operation_id="listRecipes",
    tags=["recipes"],
    summary="Names and digests of the recipes",
    responses=problem_responses(InternalError),
)
async def list_recipes(state: AppState) -> list[RecipeRef]:
    """The recipes that a request may name."""
    return [reference(recipe) for recipe in state.recipes]


@router.get(
    "/recipes/{name}",
    response_model=Recipe,
    operation_id="getRecipe",
    tags=["recipes"],
    summary="A recipe with all its numbers",
    responses=problem_responses(NotFoundError, InternalError),
)
async def get_recipe(name: str, state: AppState) -> Response:
    """Every number and choice of a recipe, defaults filled in."""
    recipe = state.recipes.get(name)
    if recipe is None:
        raise NotFoundError(f"no recipe {name!r}")
    return json_answer(recipe)


@router.get(
    "/metrics",
    operation_id="metrics",
    tags=["service"],
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: METRICS_CONTENT, **problem_responses(InternalError)},
)
async def metrics(state: AppState) -> Response:
    """Prometheus text format."""
    of_engines = await state.scrape_engines()
    # On a thread: with many runs it takes a tenth of a second, and requests need not wait for it.
    content = await asyncio.to_thread(state.metrics.render, of_engines)
    return Response(content, media_type=CONTENT_TYPE_LATEST)
