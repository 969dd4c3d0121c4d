"""Routes for supervisors and load balancers, open to everybody."""

from typing import Annotated

from fastapi import APIRouter, Depends

from shopr1_client.errors import InternalError, NotReadyError
from shopr1_client.wire import Health
from shopr1_service.http.problem_responses import problem_responses
from shopr1_service.http.state import State, state_of

router = APIRouter(prefix="/health", tags=["health"])


@router.get(
    "/live",
    response_model=Health,
    operation_id="live",
    summary="Is the process alive?",
    responses=problem_responses(InternalError, NotReadyError),
)
async def live(state: Annotated[State, Depends(state_of)]) -> Health:
    """200 while the policy loads and as long as the engine gives signs of life; 503 when it hangs."""
    state.check_alive()
    return Health(status="live")


@router.get(
    "/ready",
    response_model=Health,
    operation_id="ready",
    summary="Can it score?",
    responses=problem_responses(InternalError, NotReadyError),
)
async def ready(state: Annotated[State, Depends(state_of)]) -> Health:
    """200 once the policy is loaded and has passed its checks, which are real forwards.

    Before that, 503 and how far it is; also when the service ends.
    """
    _ = state.scorer
    return Health(status="ready")
