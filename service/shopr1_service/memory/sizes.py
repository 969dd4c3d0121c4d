"""Estimates of the memory that Python's objects take, from their numbers and the lengths of their texts.

Counting every object would take longer than scoring some requests. Tests compare the estimates with
`tracemalloc`.
"""

import sys
from collections.abc import Iterable, Sequence

from shopr1_client.wire import (
    Completion,
    Group,
    Include,
    Prompt,
    ScoreRequest,
    Text,
    TokenIds,
)
from shopr1_service.answers import Reward, ScoreResponse
from shopr1_service.core import PreparedGroup, PreparedRollout, ScoredRequest

_INT_BYTES = 32
_ID_BYTES = _INT_BYTES + 8
"""A token id in a list."""
_LAST_SMALL_INT = 256
_OFFSET_BYTES = 64
_COPIED_ID_BYTES = 16
"""An id of a request: the body's list and the model's have one object."""

_GROUP_BYTES = 1_700
_PREPARED_BYTES = 600
_MODEL_BYTES = 700
"""A small pydantic model, and the object of the body that it was made of."""
_ROLLOUT_BYTES = 900
_PREDICTION_BYTES = 1_300
_REWARD_BYTES = 1_300
_PREDICTED_BYTES = 500
_TOKEN_BYTES = 600
"""A measured token in an answer, as an object and in JSON."""
_ANSWER_BYTES = 2_500
_FACTS_BYTES = 200


def text_bytes(texts: Iterable[str | None]) -> int:
    """Strings, each in a list."""
    return sum(sys.getsizeof(text) + 8 for text in texts if text is not None)


def json_bytes(value: object) -> int:
    """Decoded JSON of any shape."""
    num_bytes, left = 0, [value]
    while left:
        each = left.pop()
        num_bytes += sys.getsizeof(each)
        if isinstance(each, dict):
            num_bytes += text_bytes(each)
            left.extend(each.values())
        elif isinstance(each, list):
            left.extend(each)
    return num_bytes


def request_bytes(request: ScoreRequest) -> int:
    """A request's model, and the JSON it was made of, without the bytes of the body."""
    return sum(map(_group_bytes, request.groups)) + json_bytes(request.chat_template_kwargs) + _GROUP_BYTES


def prepared_bytes(request: ScoreRequest, groups: Sequence[PreparedGroup]) -> int:
    """A request's prepared groups, in the queue and after it, and the answer that they will get."""
    return _ANSWER_BYTES + sum(
        _prepared_bytes(sent, group, request.include)
        for sent, group in zip(request.groups, groups, strict=True)
    )


def scored_bytes(scored: ScoredRequest) -> int:
    """An answer that is kept, with its facts."""
    decoded = [rollout.decoded for group in scored.facts for rollout in group.rollouts]
    return answer_bytes(scored.response) + _FACTS_BYTES * len(decoded) + text_bytes(decoded)


def answer_bytes(answer: ScoreResponse) -> int:
    """An answer without optional parts."""
    return _ANSWER_BYTES + sum(
        _PREPARED_BYTES + text_bytes([group.id]) + sum(map(_reward_bytes, group.rewards))
        for group in answer.groups
    )


def _group_bytes(group: Group) -> int:
    options = json_bytes(group.chat_template_kwargs) + text_bytes([group.id, group.chat_template])
    truth = json_bytes(group.ground_truth)
    texts = _input_bytes(group.prompt) + sum(
        # The usual case first: this runs for every rollout.
        sys.getsizeof(each) + _COPIED_ID_BYTES if isinstance(each, str) else _input_bytes(each)
        for each in group.completions
    )
    return _GROUP_BYTES + options + truth + texts


def _input_bytes(given: Prompt | Completion) -> int:
    match given:
        case str():
            return sys.getsizeof(given) + _COPIED_ID_BYTES
        case Text():
            return sys.getsizeof(given.text) + _MODEL_BYTES
        case TokenIds():
            return (_INT_BYTES + _COPIED_ID_BYTES) * len(given.token_ids) + _MODEL_BYTES
        case _:
            return sum(_MODEL_BYTES + text_bytes([each.role, each.content]) for each in given)


def _prepared_bytes(sent: Group, group: PreparedGroup, include: Sequence[Include]) -> int:
    num_new_ids = 0 if isinstance(sent.prompt, TokenIds) else len(group.prompt_ids)
    num_bytes = _PREPARED_BYTES + _ID_BYTES * num_new_ids
    if Include.TOKEN_IDS in include:
        num_bytes += _ID_BYTES * len(group.prompt_ids)
    for completion, rollout in zip(sent.completions, group.rollouts, strict=True):
        num_bytes += _ROLLOUT_BYTES + _REWARD_BYTES
        if (prediction := rollout.judgement.prediction) is not None:
            num_bytes += _PREDICTION_BYTES + _PREDICTED_BYTES
            num_bytes += sum(map(sys.getsizeof, prediction.action.attributes.values()))
            if prediction.extra_keys or prediction.converted:
                num_bytes += text_bytes((*prediction.extra_keys, *prediction.converted))
        if rollout.tokens.ids:
            num_bytes += _tokens_bytes(rollout, include, is_new=not isinstance(completion, TokenIds))
    return num_bytes


def _tokens_bytes(rollout: PreparedRollout, include: Sequence[Include], *, is_new: bool) -> int:
    """Tokens of a prepared completion, and what its reward says about them.

    Args:
        is_new: whether its ids are objects of their own; else its text is, decoded from the request's ids.
    """
    tokens, num_measured = rollout.tokens, len(rollout.measured)
    num_bytes = _ID_BYTES * len(tokens.ids) if is_new else sys.getsizeof(tokens.text)
    # Python has one object for each small integer, and a new one for each larger one.
    index_bytes = _INT_BYTES if len(tokens.text) > _LAST_SMALL_INT else 0
    num_bytes += (_OFFSET_BYTES + 2 * index_bytes) * len(tokens.offsets) + (index_bytes + 8) * num_measured
    if Include.TOKENS in include:
        num_bytes += _TOKEN_BYTES * num_measured
    if Include.TOKEN_IDS in include:
        num_bytes += _ID_BYTES * len(tokens.ids)
    return num_bytes


def _reward_bytes(reward: Reward) -> int:
    details = reward.details
    num_bytes = _REWARD_BYTES
    if details.format_message is not None or reward.message is not None:
        num_bytes += text_bytes([reward.message, details.format_message])
    if details.predicted_action is not None:
        num_bytes += _PREDICTED_BYTES + sum(map(sys.getsizeof, details.predicted_action.values()))
        if details.extra_keys or details.converted:
            num_bytes += text_bytes((*details.extra_keys, *details.converted))
    return num_bytes
