"""The forward of a group: one prompt, the beginnings of several completions, hidden states out.

Four ways, of which a self-check at load chooses the first that is right:

    SharedPrefixForward   the prompt once, kept across requests, read in place (`shared_forward.py`)
    PackedForward         the prompt once; all completions in one row on its cache (`packed_forward.py`)
    ExpandedForward       the prompt once; completions in a batch on copies of it (`expanded_forward.py`)
    IndependentForward    each completion with the whole prompt: slow, and right for every architecture

Some architectures ignore a cache, a mask or positions they are given, without an error. Hence the check on
random tokens, longer than any window or chunk of the model, against independent forwards.

Dimensions: S positions asked for, H hidden size.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.engine.lm_head import trunk_of

logger = logging.getLogger(__name__)

# Relative error of hidden states that rounding explains; a lost prompt gives errors around 1.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_NUM_SUFFIX_TOKENS = 6


@dataclass(frozen=True)
class Suffix:
    """What is to be computed of one completion.

    Attributes:
        ids: the completion's tokens that must be fed: up to the last position asked for.
        positions: positions whose hidden states are wanted, counted from the completion's first token;
            −1 is the prompt's last token.
    """

    ids: Sequence[int]
    positions: Sequence[int]


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and what is to be computed of its completions."""

    prompt_ids: Sequence[int]
    suffixes: Sequence[Suffix]


def common_lead(suffixes: Sequence[Suffix]) -> Sequence[int]:
    """What all suffixes begin with, up to the first position whose hidden state is wanted."""
    lead = suffixes[0].ids[: suffixes[0].positions[0] + 1]
    for suffix in suffixes[1:]:
        length = min(len(lead), suffix.positions[0] + 1)
        length = next((i for i in range(length) if suffix.ids[i] != lead[i]), length)
        lead = lead[:length]
    return lead


class Forward(Protocol):
    """Hidden states of groups."""

    @property
    def name(self) -> str:
        """As `/info` shows it."""
        ...

    def hidden_states(self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> list[Tensor]:
        """For each suffix the hidden states at its positions, [S, H]."""
        ...

    def batch(self, groups: Sequence[PromptGroup]) -> list[list[Tensor]]:
        """The same for several groups: together where that is faster."""
        ...


class GroupwiseForward(ABC):
    """A forward that takes one group after the other."""

    @abstractmethod
    def hidden_states(self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> list[Tensor]:
        """See `Forward`."""

    def batch(self, groups: Sequence[PromptGroup]) -> list[list[Tensor]]:
        return [self.hidden_states(group.prompt_ids, group.suffixes) for group in groups]


class IndependentForward(GroupwiseForward):
    """Each completion with its prompt, alone. The reference for every other way."""

    name = "independent"

    def __init__(self, model: PreTrainedModel) -> None:
        self._trunk = trunk_of(model)
        self._device = model.device

    @torch.inference_mode()
    def hidden_states(self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> list[Tensor]:
        return [self._hidden(prompt_ids, suffix) for suffix in suffixes]

    def _hidden(self, prompt_ids: Sequence[int], suffix: Suffix) -> Tensor:
        input_ids = _row([*prompt_ids, *suffix.ids], self._device)
        hidden_T_H: Tensor = self._trunk(input_ids=input_ids, use_cache=False).last_hidden_state[0]
        return hidden_T_H[[len(prompt_ids) + position for position in suffix.positions]]


def choose_forward(
    model: PreTrainedModel, random_ids: Sequence[int], candidates: Sequence[Forward]
) -> Forward:
    """The first of the candidates that agrees with independent forwards on these tokens; else these."""
    reference = IndependentForward(model)
    if len(random_ids) <= _NUM_SUFFIX_TOKENS or _rope_depends_on_length(model):
        return reference
    groups, expected = _check_groups(random_ids), None
    for candidate in candidates:
        try:
            expected = expected or reference.batch(groups)
            if _gives(candidate, groups, expected):
                return candidate
            logger.info("%s computes something else by %s", type(model).__name__, candidate.name)
        except Exception as error:  # an architecture may refuse in any way it likes
            logger.info("%s cannot do %s: %r", type(model).__name__, candidate.name, error)
    logger.warning("%s cannot share a prompt: each completion is run with all of it", type(model).__name__)
    return reference


def _check_groups(random_ids: Sequence[int]) -> list[PromptGroup]:
    prompt_ids, rest = random_ids[:-_NUM_SUFFIX_TOKENS], random_ids[-_NUM_SUFFIX_TOKENS:]
    apart = [Suffix(rest, [-1, 0, 5]), Suffix([], [-1]), Suffix(rest[:1], [0]), Suffix(rest[4:], [0, 1])]
    alike = [Suffix([*rest[:3], token_id], [2, 3]) for token_id in rest]
    # The second time the prompt may be known, the third time it is the beginning of another.
    prompts = [(prompt_ids, apart), (prompt_ids, alike), ([*prompt_ids, *rest[:2]], alike)]
    return [PromptGroup(*group) for group in prompts]


def _gives(candidate: Forward, groups: Sequence[PromptGroup], expected: Sequence[Sequence[Tensor]]) -> bool:
    """One after the other, when a prompt may be known from before, and together, when passes are shared."""
    alone = [states for group in groups for states in candidate.batch([group])]
    return all(
        _agree(*states)
        for actual in (alone, candidate.batch(groups))
        for pair in zip(actual, expected, strict=True)
        for states in zip(*pair, strict=True)
    )


def _rope_depends_on_length(model: PreTrainedModel) -> bool:
    """Whether keys are rotated otherwise in a longer sequence: those of a prompt can't be kept then."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _agree(actual: Tensor, expected: Tensor) -> bool:
    scale = expected.double().norm()
    error = (actual.double() - expected.double()).norm()
    return bool(error <= _TOLERANCE[expected.dtype] * scale)


def _row(ids: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([list(ids)], dtype=torch.long, device=device)


MAX_PASS_TOKENS = 8192
"""Tokens of one pass. Enough to fill any device; bounds what activations take of its memory."""
