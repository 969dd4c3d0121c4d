"""Run the rests of a group's completions as a batch, each on a copy of the model's cache of the prompt.

Right for most recurrent architectures too: their state is copied like keys and values. Rows are padded at the
end, where no token that is read can see the padding.

Dimensions: B rows, P tokens of the prefix, R of the longest rest, T of a rest, H hidden size.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from shopr1_service.engine.forward.base import MAX_PASS_TOKENS, Suffix, batches
from shopr1_service.engine.forward.prefill import Ids, PrefilledForward

MAX_CACHED_TOKENS = 64 * 2**10
"""B · (P + R) of one pass: bounds the memory of the prompt cache's copies."""
MIN_ROW_TOKENS = 2
"""Recurrent architectures have separate code for a single token, which is not always right."""


class ExpandedForward(PrefilledForward):
    """A batch of completions on copies of the prompt's cache."""

    name = "expanded"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._cache_name = cache_name(self._trunk)
        self._takes_positions = takes_positions(self._trunk)

    def _prefill(self, ids: Ids) -> tuple[Cache, Tensor]:
        # The model creates the cache: some accept no other.
        output = self._trunk(input_ids=self._tensor([ids]), use_cache=True)
        return getattr(output, self._cache_name), output.last_hidden_state[0, -1:]

    def _rest_states(self, prefix: Cache, num_prefix_tokens: int, rests: Sequence[Ids]) -> list[Tensor]:
        def fits(batch: Sequence[Ids]) -> bool:
            longest = max(map(len, batch))
            num_cached = len(batch) * (num_prefix_tokens + longest)
            return len(batch) * longest <= MAX_PASS_TOKENS and num_cached <= MAX_CACHED_TOKENS

        # Rows of similar length need little padding.
        order = sorted(range(len(rests)), key=lambda i: len(rests[i]))
        ordered = batches([rests[i] for i in order], fits)
        states = [
            hidden_T_H for batch in ordered for hidden_T_H in self._pass(prefix, num_prefix_tokens, batch)
        ]
        by_place = dict(zip(order, states, strict=True))
        return [by_place[i] for i in range(len(rests))]

    def _pass(self, prefix: Cache, num_prefix_tokens: int, rests: Sequence[Ids]) -> list[Tensor]:
        longest = max(map(len, rests))
        num_tokens = max(longest, MIN_ROW_TOKENS)
        ids_B_R = self._tensor([[*rest, *[rest[-1]] * (num_tokens - len(rest))] for rest in rests])
        # Padding repeats the last position: a table of positions may end there.
        positions = [num_prefix_tokens + min(i, longest - 1) for i in range(num_tokens)]
        copies = self._copies(prefix, len(rests))
        states_B_R_H = self._run(copies, ids_B_R, self._tensor([positions]).expand(len(rests), -1))
        return [hidden_R_H[: len(rest)] for hidden_R_H, rest in zip(states_B_R_H, rests, strict=True)]

    def _run(self, cache: Cache, ids_B_R: Tensor, positions_B_R: Tensor) -> Tensor:
        """The hidden states of rows, [B, R, H], after what the cache holds. They are added to it."""
        options: dict[str, Any] = {self._cache_name: cache}
        if self._takes_positions:
            options["position_ids"] = positions_B_R
        hidden_B_R_H: Tensor = self._trunk(input_ids=ids_B_R, use_cache=True, **options).last_hidden_state
        return hidden_B_R_H

    def _copies(self, prefix: Cache, num_rows: int) -> Cache:
        """Copies for a batch of rows: the forward writes to its cache, and the prompt's must not change."""
        copies = copy.deepcopy(prefix)
        first_B = torch.zeros(num_rows, dtype=torch.long, device=self._device)
        copies.reorder_cache(cast("torch.LongTensor", first_B))
        return copies


class SteppedForward(ExpandedForward):
    """A batch of completions on copies of the prompt's cache, a token at a time.

    Mamba's first generation continues from a state by single tokens only: more start from a state of zeros.
    """

    name = "stepped"

    @torch.inference_mode()
    def hidden_states(self, prompt_ids: Ids, suffixes: Sequence[Suffix]) -> list[Tensor]:
        if len(suffixes) == 1:  # nothing is shared
            return self._independent.hidden_states(prompt_ids, suffixes)
        return super().hidden_states(prompt_ids, suffixes)

    def _run(self, cache: Cache, ids_B_R: Tensor, positions_B_R: Tensor) -> Tensor:
        steps = zip(torch.split(ids_B_R, 1, dim=1), torch.split(positions_B_R, 1, dim=1), strict=True)
        return torch.cat([super(SteppedForward, self)._run(cache, *step) for step in steps], dim=1)


def cache_name(trunk: nn.Module) -> str:
    """The name of the argument that takes a cache."""
    return (
        "cache_params" if "cache_params" in inspect.signature(trunk.forward).parameters else "past_key_values"
    )


def takes_positions(trunk: nn.Module) -> bool:
    """Whether positions must be given. Some architectures do not derive them from their cache."""
    return "position_ids" in inspect.signature(trunk.forward).parameters
