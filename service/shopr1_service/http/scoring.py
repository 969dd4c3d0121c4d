"""Scores a request: the common part of every route that scores."""

import hashlib
import json
from functools import partial

from asgi_correlation_id import correlation_id
from fastapi import Request

from shopr1_client.errors import MalformedBodyError
from shopr1_client.wire import ScoreRequest, ScoreResponse
from shopr1_service.core import Origin
from shopr1_service.http.deadline import run_until_deadline
from shopr1_service.http.middleware.request_recorder import SIZES
from shopr1_service.http.state import State
from shopr1_service.monitoring.logs import current_run


async def score_request(
    body: ScoreRequest, request: Request, state: State, timeout_s: float | None = None
) -> ScoreResponse:
    """Score a request until its deadline, or until its client disconnects.

    Args:
        timeout_s: seconds that the client waits; at most, and by default, `request_timeout_s`.

    Raises:
        ProblemError: of any class.
        ClientDisconnectedError: the client has closed the connection.
    """
    num_rollouts = sum(len(group.completions) for group in body.groups)
    request.scope[SIZES] = {"num_groups": len(body.groups), "num_rollouts": num_rollouts}
    longest_s = state.settings.request_timeout_s
    origin = Origin(correlation_id.get() or "", current_run.get())
    start = partial(state.scorer.score, body, origin)
    # Requests with `include` have large responses and come from people, who do not send duplicates.
    if body.include:
        work = start()
    else:
        key = _key(body, state.engine.settled_number, origin.run)
        work = state.deduplicator.score(key, start)
    response = await run_until_deadline(work, request, min(timeout_s or longest_s, longest_s), state.shutdown)
    return response.model_copy(update={"request_id": origin.request_id})


def _key(body: ScoreRequest, settled_number: int, run: str) -> bytes:
    """Digest that is equal for duplicate requests, by whichever route they arrive."""
    try:
        # Escapes half surrogate pairs, which pydantic's own JSON refuses.
        text = json.dumps([settled_number, run, body.model_dump()])
    except RecursionError:  # reading JSON takes fewer frames than writing it
        raise MalformedBodyError("the body is nested too deeply") from None
    return hashlib.blake2b(text.encode()).digest()
