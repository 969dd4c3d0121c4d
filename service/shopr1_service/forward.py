"""The forward of a group: one prompt, the beginnings of several completions, hidden states out.

Three ways, of which a self-check at load chooses the first that is right:

    SharedPrefixForward   the prompt once, kept across requests, read in place (`shared_forward.py`)
    CachedPrefixForward   the prompt once; each completion on a copy of its key-value cache
    IndependentForward    each completion with the whole prompt: slow, and right for every architecture

Some architectures ignore a cache they are given, without an error. Hence the check on random tokens, longer
than any sliding window, against independent forwards.

Dimensions: S positions asked for, H hidden size.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.head import trunk_of

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


class Forward(Protocol):
    """Hidden states of a group."""

    @property
    def name(self) -> str:
        """As `/info` shows it."""
        ...

    def hidden_states(self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> list[Tensor]:
        """For each suffix the hidden states at its positions, [S, H]."""
        ...


class IndependentForward:
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


class CachedPrefixForward:
    """The prompt once; each completion on a copy of the prompt's cache."""

    name = "cached_prefix"

    def __init__(self, model: PreTrainedModel) -> None:
        self._trunk = trunk_of(model)
        self._device = model.device
        self._independent = IndependentForward(model)

    @torch.inference_mode()
    def hidden_states(self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> list[Tensor]:
        if not prompt_ids:
            return self._independent.hidden_states(prompt_ids, suffixes)
        output = self._trunk(input_ids=_row(prompt_ids, self._device), use_cache=True)
        last_1_H = output.last_hidden_state[0, -1:]
        # Recurrent architectures have other code for one token alone, which is not always right.
        return [
            self._independent.hidden_states(prompt_ids, [suffix])[0]
            if len(suffix.ids) == 1
            else self._hidden(output.past_key_values, last_1_H, suffix)
            for suffix in suffixes
        ]

    def _hidden(self, prefix_cache: Any, last_1_H: Tensor, suffix: Suffix) -> Tensor:  # noqa: ANN401
        hidden_T_H = last_1_H
        if suffix.ids:
            # The copy is written to by the forward; the prompt's cache must stay as it is.
            output = self._trunk(
                input_ids=_row(suffix.ids, self._device),
                past_key_values=copy.deepcopy(prefix_cache),
                use_cache=True,
            )
            hidden_T_H = torch.cat([last_1_H, output.last_hidden_state[0]])
        return hidden_T_H[[position + 1 for position in suffix.positions]]


def choose_forward(
    model: PreTrainedModel, random_ids: Sequence[int], candidates: Sequence[Forward]
) -> Forward:
    """The first of the candidates that agrees with independent forwards on these tokens; else these."""
    reference = IndependentForward(model)
    if len(random_ids) <= _NUM_SUFFIX_TOKENS or _rope_depends_on_length(model):
        return reference
    for candidate in candidates:
        try:
            if _gives_the_same(candidate, reference, random_ids):
                return candidate
            logger.info("%s computes something else by %s", type(model).__name__, candidate.name)
        except Exception as error:  # an architecture may refuse in any way it likes
            logger.info("%s cannot do %s: %r", type(model).__name__, candidate.name, error)
    logger.warning("%s cannot share a prompt: each completion is run with all of it", type(model).__name__)
    return reference


def _gives_the_same(candidate: Forward, reference: Forward, random_ids: Sequence[int]) -> bool:
    prompt_ids, rest = random_ids[:-_NUM_SUFFIX_TOKENS], random_ids[-_NUM_SUFFIX_TOKENS:]
    apart = [Suffix(rest, [-1, 0, 5]), Suffix([], [-1]), Suffix(rest[:1], [0]), Suffix(rest[4:], [0, 1])]
    alike = [Suffix([*rest[:3], token_id], [2, 3]) for token_id in rest]
    # The second time the prompt may be known, the third time it is the beginning of another.
    groups = [(prompt_ids, apart), (prompt_ids, alike), ([*prompt_ids, *rest[:2]], alike)]
    return all(
        _agree(actual, expected)
        for prompt, suffixes in groups
        for actual, expected in zip(
            candidate.hidden_states(prompt, suffixes),
            reference.hidden_states(prompt, suffixes),
            strict=True,
        )
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
