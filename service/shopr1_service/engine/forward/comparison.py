"""Passes that the check at load compares: independent ones, groups of short prompts, errors between both.

Knows no strategy and draws no conclusion.

Dimensions: T positions, H hidden size.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.engine.forward.base import IndependentForward, PromptGroup, Suffix
from shopr1_service.engine.forward.rounding import Tolerance, relative_errors, tolerance_of
from shopr1_service.engine.lm_head import trunk_of

MAX_SHORT_TOKENS = 64
"""Tokens of the sequences that are compared in all arrangements."""
NUM_SUFFIX_TOKENS = 6
"""Tokens of the longest completion of a short prompt."""
NUM_SHORT_DRAWS = 4
"""Disturbed passes of a short sequence, in 16 bits."""
_NUM_ALIKE = 3
"""Completions that differ in their last token alone: a first, a middle and a last row of a batch."""


def independent_states(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The states of an independent forward at all positions, [T, H]."""
    suffix = Suffix(ids[1:], range(-1, len(ids) - 1))
    [states_T_H] = IndependentForward(model).hidden_states(ids[:1], [suffix])
    return states_T_H


def pass_tolerance(
    model: PreTrainedModel, ids: Sequence[int], states_T_H: Tensor, num_draws: int
) -> Tolerance:
    """The tolerance for comparisons with an independent forward of `ids`, whose states are given."""
    return tolerance_of(
        trunk_of(model), states_T_H, lambda: independent_states(model, ids), num_draws=num_draws
    )


def beginnings(
    ids: Sequence[int], num_prompt_tokens: int, states_T_H: Tensor
) -> tuple[list[Suffix], list[Tensor]]:
    """Completions that are beginnings of one, and their states in a causal model.

    Args:
        ids: a prompt and its completion.
        states_T_H: of an independent forward of `ids`.
    """
    completion = ids[num_prompt_tokens:]
    parts = [(completion, [-1, 0, len(completion) - 1]), (completion[:0], [-1]), (completion[:1], [0])]
    suffixes = [Suffix(part, positions, len(ids)) for part, positions in parts]
    return suffixes, [states_at(states_T_H, num_prompt_tokens, suffix) for suffix in suffixes]


def states_at(states_T_H: Tensor, num_prompt_tokens: int, suffix: Suffix) -> Tensor:
    """The states of a whole row at the positions of a completion."""
    return states_T_H[[num_prompt_tokens + position for position in suffix.positions]]


def short_groups(random_ids: Sequence[int]) -> list[PromptGroup]:
    """Prompts with completions in all arrangements that requests have."""
    prompt_ids, rest = random_ids[:-NUM_SUFFIX_TOKENS], random_ids[-NUM_SUFFIX_TOKENS:]
    apart = [Suffix(rest, [-1, 0, 5]), Suffix([], [-1]), Suffix(rest[:1], [0]), Suffix(rest[4:], [0, 1])]
    alike = [Suffix([*rest[:3], token_id], [2, 3]) for token_id in rest[:_NUM_ALIKE]]
    # The second prompt may be cached already; the third begins with it.
    prompts = [(prompt_ids, apart), (prompt_ids, alike), ([*prompt_ids, *rest[:2]], alike)]
    return [PromptGroup(*group) for group in prompts]


def batch_errors(actual: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Relative errors of the states of each completion of each group, [positions]."""
    return [
        relative_errors(*states)
        for pair in zip(actual, expected, strict=True)
        for states in zip(*pair, strict=True)
    ]
