"""From a request to its answer: what every route that scores has in common."""

from fastapi import Request

from shopr1_client.wire import ScoreRequest, ScoreResponse
from shopr1_service.patience import within
from shopr1_service.request_id import request_id_of
from shopr1_service.state import State


async def answer(
    body: ScoreRequest, request: Request, state: State, timeout_s: float | None = None
) -> ScoreResponse:
    """Score a request, as long as its client is there and its time is not up.

    Args:
        timeout_s: how long the client will wait; at most, and by default, `request_timeout_s`.

    Raises:
        ProblemError: of any class.
        ClientGoneError: nobody waits for the answer any more.
    """
    longest_s = state.settings.request_timeout_s
    work = state.scorer.score(body, request_id_of(request.scope))
    return await within(work, request, min(timeout_s or longest_s, longest_s))
