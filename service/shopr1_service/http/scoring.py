"""Scores a request: the common part of every route that scores."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import orjson
from asgi_correlation_id import correlation_id
from fastapi import Request
from pydantic import BaseModel

from shopr1_client.wire import ScoreRequest
from shopr1_service.answers import GroupScore, ScoreResponse
from shopr1_service.concurrency import checkpoint
from shopr1_service.core import Origin
from shopr1_service.http.deadline import run_until_deadline
from shopr1_service.http.json_body import beside_loop
from shopr1_service.http.middleware.body_limits import MEMORY
from shopr1_service.http.middleware.request_recorder import SIZES
from shopr1_service.http.request_keys import content_key, own_key
from shopr1_service.http.state import State
from shopr1_service.memory.budget import Hold
from shopr1_service.memory.sizes import request_bytes
from shopr1_service.monitoring.logs import current_run
from shopr1_service.scoring.prepare import check_size


class Answer(NamedTuple):
    """The response to a request, and whether it was counted: False if an earlier try of it was."""

    response: ScoreResponse
    is_counted: bool


async def score_request(
    body: ScoreRequest, request: Request, state: State, timeout_s: float | None = None
) -> Answer:
    """Score a request until its deadline, or until its client disconnects.

    Its rollouts are counted when there is a response and a client to receive it.

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
    check_size(body, state.settings.limits)  # before any other work on its texts
    memory: Hold = request.scope[MEMORY]
    memory.grow(request_bytes(body))
    content = await beside_loop(request, partial(content_key, body, origin.run))
    key = own_key(request, content)
    scorer = state.scorer
    # Requests with `include` have large responses and come from people, who do not send duplicates.
    if body.include:
        work = scorer.compute(body, memory=memory)
    else:
        start = partial(scorer.compute, body, memory=memory)
        version = b"%d:" % scorer.engine.settled_number
        work = state.deduplicator.score(version + content, start)
    scored = await run_until_deadline(work, request, min(timeout_s or longest_s, longest_s), state.shutdown)
    is_counted = state.counted.add(key)
    if is_counted:
        await scorer.observe(body, origin, scored)
    else:
        state.metrics.record_retry()
    return Answer(replace(scored.response, request_id=origin.request_id), is_counted)


def encode_response(response: ScoreResponse) -> bytes:
    """The JSON of a response, a reward at a time: `orjson` lets no other thread run while it writes."""
    groups = b",".join(map(_encode_group, response.groups))
    return _with_list(response, "groups", groups)


def _encode_group(group: GroupScore) -> bytes:
    rewards = []
    for reward in group.rewards:
        checkpoint()
        rewards.append(orjson.dumps(reward))
    return _with_list(group, "rewards", b",".join(rewards))


def _with_list(answer: ScoreResponse | GroupScore, name: str, items: bytes) -> bytes:
    """The JSON of an object, with a list that is encoded already as its last member."""
    head = {key: value for key, value in vars(answer).items() if key != name}
    begin = orjson.dumps(head, default=BaseModel.model_dump).removesuffix(b"}")
    return b'%b,"%b":[%b]}' % (begin, name.encode(), items)
