"""From a request to its answer: what every route that scores has in common."""

import hashlib
import json
from functools import partial

from fastapi import Request

from shopr1_client.wire import ScoreRequest, ScoreResponse
from shopr1_service.core import Origin
from shopr1_service.http.deadline import within
from shopr1_service.http.middleware.run_id import run_of
from shopr1_service.http.request_context import record_sizes, request_id_of
from shopr1_service.http.state import State


async def answer(
    body: ScoreRequest, request: Request, state: State, timeout_s: float | None = None
) -> ScoreResponse:
    """Score a request, as long as its client is there and its time is not up.

    Args:
        timeout_s: how long the client will wait; at most, and by default, `request_timeout_s`.

    Raises:
        ProblemError: of any class.
        ClientDisconnectedError: nobody waits for the answer any more.
    """
    num_rollouts = sum(len(group.completions) for group in body.groups)
    record_sizes(request.scope, num_groups=len(body.groups), num_rollouts=num_rollouts)
    longest_s = state.settings.request_timeout_s
    origin = Origin(request_id_of(request.scope), run_of(request.scope))
    start = partial(state.scorer.score, body, origin)
    # What is included is large, and asked for by people, who do not repeat themselves.
    if body.include:
        work = start()
    else:
        key = _key(body, state.engine.settled_number, origin.run)
        work = state.deduplicator.score(key, start)
    given = await within(work, request, min(timeout_s or longest_s, longest_s), state.shutdown)
    return given.model_copy(update={"request_id": origin.request_id})


def _key(body: ScoreRequest, settled_number: int, run: str) -> bytes:
    """Equal for requests that must get the same answer and count once, by whatever route they come."""
    # Escapes half surrogate pairs, which pydantic's own JSON refuses.
    text = json.dumps([settled_number, run, body.model_dump()])
    return hashlib.blake2b(text.encode()).digest()
