"""Routes about the service itself: policy and limits, recipes, metrics, health."""

import asyncio

from fastapi import APIRouter, Response

from shopr1_client.errors import InternalError, NotFoundError, NotReadyError
from shopr1_client.wire import Health, Info, RecipeRef
from shopr1_rewards import Recipe
from shopr1_service import __version__
from shopr1_service.http.openapi import METRICS_CONTENT
from shopr1_service.http.problem_responses import problem_responses
from shopr1_service.http.state import AppState
from shopr1_service.monitoring.metrics import CONTENT_TYPE_LATEST
from shopr1_service.scoring.recipe_book import reference

router = APIRouter()
health_router = APIRouter(prefix="/health", tags=["health"])
"""For supervisors and load balancers, without a key."""


@router.get(
    "/info",
    operation_id="info",
    tags=["service"],
    summary="Policy, limits and recipes",
    responses=problem_responses(InternalError, NotReadyError),
)
async def info(state: AppState) -> Info:
    """The loaded policy, the way it computes, and the limits of a request."""
    return Info(
        version=__version__,
        policy=state.engine.info,
        limits=state.settings.limits,
        default_recipe=reference(state.recipes.default),
        recipes=[reference(recipe) for recipe in state.recipes],
    )


@router.get(
    "/recipes",
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
    operation_id="getRecipe",
    tags=["recipes"],
    summary="A recipe with all its numbers",
    responses=problem_responses(NotFoundError, InternalError),
)
async def get_recipe(name: str, state: AppState) -> Recipe:
    """Every number and choice of a recipe, defaults filled in."""
    recipe = state.recipes.get(name)
    if recipe is None:
        raise NotFoundError(f"no recipe {name!r}")
    return recipe


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


@health_router.get(
    "/live",
    operation_id="live",
    summary="Is the process alive?",
    responses=problem_responses(InternalError, NotReadyError),
)
async def live(state: AppState) -> Health:
    """200 while the policy loads and as long as the engine's heartbeat is recent; 503 when it hangs."""
    state.check_alive()
    return Health(status="live")


@health_router.get(
    "/ready",
    operation_id="ready",
    summary="Can it score?",
    responses=problem_responses(InternalError, NotReadyError),
)
async def ready(state: AppState) -> Health:
    """200 once the policy is loaded and has passed its checks, which are real forwards.

    Before that, 503 with the progress of loading; also when the service ends.
    """
    state.scorer  # noqa: B018  # raises unless ready
    return Health(status="ready")
