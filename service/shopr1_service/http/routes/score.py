"""The route `POST /score`."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Body, Header, Request, Response

from shopr1_client.errors import PolicyVersionError
from shopr1_client.wire import ScoreRequest, ScoreResponse
from shopr1_service.http import examples
from shopr1_service.http.json_body import JsonRoute, beside_loop
from shopr1_service.http.problem_responses import SCORING, problem_responses
from shopr1_service.http.scoring import encode_response, score_request
from shopr1_service.http.state import AppState

router = APIRouter(tags=["score"], route_class=JsonRoute)

_TIMEOUT = Header(
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
    summary="Score groups of rollouts",
    responses=problem_responses(*SCORING, PolicyVersionError),
)
async def score(
    body: Annotated[ScoreRequest, Body(openapi_examples=examples.SCORE_REQUESTS)],
    request: Request,
    state: AppState,
    timeout_s: Annotated[float | None, _TIMEOUT] = None,
) -> Response:
    """Rewards of every completion, in the order of the request, each with its weighted terms.

    A completion that is not valid JSON is scored 0, with the reason. One that cannot be scored has
    `reward: null`, `status: unscorable` and a reason: it is never given a 0 or NaN.
    """
    answer = await score_request(body, request, state, timeout_s)
    content = await beside_loop(request, partial(encode_response, answer.response))
    return Response(content, media_type="application/json")
