"""Confirmation that the outcome of an earlier check at load still holds, in a few short passes."""

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from shopr1_service.engine.forward.base import Forward, PromptGroup
from shopr1_service.engine.forward.comparison import (
    MAX_SHORT_TOKENS,
    NUM_SHORT_DRAWS,
    NUM_SUFFIX_TOKENS,
    batch_errors,
    beginnings,
    independent_states,
    pass_tolerance,
)
from shopr1_service.engine.forward.reach import Reach

logger = logging.getLogger(__name__)


def depends_on_weights(model: PreTrainedModel) -> bool:
    """Whether the check of another checkpoint of this architecture may end otherwise.

    Ties between the keys that a model chooses by their content are broken by the sequence's length, and
    weights decide whether there are any.
    """
    return Reach.of(model).num_chosen is not None


def confirms(model: PreTrainedModel, random_ids: Sequence[int], forward: Forward) -> bool:
    """Whether a strategy that an earlier check has chosen agrees with independent forwards on one prompt.

    That shows a defect of the machine or of the weights. The rest of the check is about the architecture's
    code, which has not changed.

    Args:
        random_ids: at most `MAX_SHORT_TOKENS` are used.
    """
    if len(random_ids) <= NUM_SUFFIX_TOKENS:
        return False
    ids = list(random_ids[:MAX_SHORT_TOKENS])
    num_prompt = len(ids) - NUM_SUFFIX_TOKENS
    states_T_H = independent_states(model, ids)
    tolerance = pass_tolerance(model, ids, states_T_H, NUM_SHORT_DRAWS)
    suffixes, expected = beginnings(ids, num_prompt, states_T_H)
    group = PromptGroup(ids[:num_prompt], suffixes)
    try:
        actual = [states for _ in range(2) for states in forward.batch([group])]  # then from the cache
    except Exception as error:  # an architecture may raise anything
        logger.info("%s with %s fails: %r", type(model).__name__, forward.name, error)
        return False
    return tolerance.allows(torch.cat(batch_errors(actual, [expected, expected])))
