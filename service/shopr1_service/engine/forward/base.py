"""Forward strategies compute the hidden states of a group: one prompt and several completions.

There are several. A check at load (`self_check.py`) chooses the first whose numbers are right:

    SharedPrefixForward   the prompt once, kept across requests, read in place (`shared_prefix.py`)
    BranchedForward       the same with recurrent layers, whose states are copied (`branched.py`)
    ExpandedForward       the prompt once; completions in a batch on copies of its cache (`expanded.py`)
    SteppedForward        the same, a token at a time (`expanded.py`)
    IndependentForward    each completion with the whole prompt: slow, right for every architecture

Dimensions: S requested positions, H hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.core import TEXT_SCOPE, PromptScope
from shopr1_service.engine.lm_head import trunk_of
from shopr1_service.engine.transfer import on_device

MAX_PASS_TOKENS = 8192
"""Tokens of one pass. Enough to saturate any device, and a bound on the memory of activations."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Suffix:
    """The part of a completion that must be computed.

    Attributes:
        ids: tokens to feed: the completion up to the last requested position.
        positions: positions of the requested hidden states, counted from the completion's first token;
            −1 is the prompt's last token.
        num_rope_tokens: where RoPE depends on the length, a length with the frequencies of prompt and whole
            completion; None: that of prompt and `ids`.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    num_rope_tokens: int | None = None


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and the suffixes of its completions.

    Attributes:
        is_kept: whether a later group may use the prompt's keys and values.
    """

    prompt_ids: Sequence[int]
    suffixes: Sequence[Suffix]
    scope: PromptScope = TEXT_SCOPE
    is_kept: bool = True


def common_lead(suffixes: Sequence[Suffix]) -> Sequence[int]:
    """The longest common beginning of all suffixes, up to the first requested position."""
    lead = suffixes[0].ids[: suffixes[0].positions[0] + 1]
    for suffix in suffixes[1:]:
        length = min(len(lead), suffix.positions[0] + 1)
        length = next((i for i in range(length) if suffix.ids[i] != lead[i]), length)
        lead = lead[:length]
    return lead


class Forward(Protocol):
    """A forward strategy."""

    @property
    def name(self) -> str:
        """The name shown by `/info`."""
        ...

    @property
    def attention(self) -> str:
        """The kernels of its attention, shown by `/info`; `model` where the model's own is run."""
        ...

    def hidden_states(self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> list[Tensor]:
        """The hidden states of each suffix at its positions, [S, H]."""
        ...

    def batch(self, groups: Sequence[PromptGroup]) -> list[list[Tensor]]:
        """The hidden states of several groups, computed together where that is faster."""
        ...


class GroupwiseForward(ABC):
    """A forward strategy that computes one group after the other."""

    attention = "model"

    @abstractmethod
    def hidden_states(self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> list[Tensor]:
        """The hidden states of each suffix at its positions, [S, H]."""

    def batch(self, groups: Sequence[PromptGroup]) -> list[list[Tensor]]:
        return [self.hidden_states(group.prompt_ids, group.suffixes) for group in groups]


class IndependentForward(GroupwiseForward):
    """Each completion alone, with its prompt. The reference for the other strategies."""

    name = "independent"

    def __init__(self, model: PreTrainedModel) -> None:
        self._trunk = trunk_of(model)
        self._device = model.device

    @torch.inference_mode()
    def hidden_states(self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> list[Tensor]:
        return [self._hidden(prompt_ids, suffix) for suffix in suffixes]

    def _hidden(self, prompt_ids: Sequence[int], suffix: Suffix) -> Tensor:
        input_ids = token_tensor([[*prompt_ids, *suffix.ids]], self._device)
        hidden_T_H: Tensor = self._trunk(input_ids=input_ids, use_cache=False).last_hidden_state[0]
        return hidden_T_H[[len(prompt_ids) + position for position in suffix.positions]]


def token_tensor(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [rows, T] on the device."""
    return on_device(torch.tensor([list(row) for row in rows], dtype=torch.long), device)


def batches(items: Sequence[_Item], fits: Callable[[Sequence[_Item]], bool]) -> Iterator[list[_Item]]:
    """Split items, in order, into batches that fit. An item that is too large is a batch of its own."""
    batch: list[_Item] = []
    for item in items:
        if batch and not fits([*batch, item]):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
