"""Base of the strategies that run a prompt into the model's own cache.

The prompt is run once, together with the common beginning of its completions (`{"rationale": "`). The rests
of the completions are run on top of it, in batches. Subclasses decide how.

Dimensions: T tokens, H hidden size.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from shopr1_service.engine.forward.base import (
    GroupwiseForward,
    IndependentForward,
    Suffix,
    common_lead,
    token_tensor,
)
from shopr1_service.engine.lm_head import trunk_of

Ids = Sequence[int]


class PrefilledForward(GroupwiseForward):
    """The prompt once, then the rests of its completions on top of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._trunk = trunk_of(model)
        self._device = model.device
        self._independent = IndependentForward(model)

    @torch.inference_mode()
    def hidden_states(self, prompt_ids: Ids, suffixes: Sequence[Suffix]) -> list[Tensor]:
        if not prompt_ids or not suffixes:
            return self._independent.hidden_states(prompt_ids, suffixes)
        lead = common_lead(suffixes)
        prefix, last_1_H = self._prefill([*prompt_ids, *lead])
        rests = [suffix.ids[len(lead) :] for suffix in suffixes]
        rows = iter(self._rest_states(prefix, len(prompt_ids) + len(lead), [rest for rest in rests if rest]))
        states = [torch.cat([last_1_H, next(rows)]) if rest else last_1_H for rest in rests]
        return [
            hidden_T_H[[position + 1 - len(lead) for position in suffix.positions]]
            for hidden_T_H, suffix in zip(states, suffixes, strict=True)
        ]

    @abstractmethod
    def _prefill(self, ids: Ids) -> tuple[Cache, Tensor]:
        """The model's cache of the common prefix, and the prefix's last hidden state, [1, H]."""

    @abstractmethod
    def _rest_states(self, prefix: Cache, num_prefix_tokens: int, rests: Sequence[Ids]) -> list[Tensor]:
        """The hidden states of each rest, [T, H]. Does not change the prefix."""

    def _tensor(self, rows: Sequence[Ids]) -> Tensor:
        return token_tensor(rows, self._device)
