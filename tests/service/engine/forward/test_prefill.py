"""The base of the prefilled strategies, with a subclass that records its calls."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from shopr1_service.engine.forward.base import IndependentForward, Suffix
from shopr1_service.engine.forward.prefill import Ids, PrefilledForward
from tests.support.models import random_ids, tiny_model


class RecordingForward(PrefilledForward):
    """Keeps the prefix as ids, and runs each rest with all of it."""

    name = "recording"

    def __init__(self) -> None:
        super().__init__(tiny_model())
        self.calls: list[tuple[Ids, Sequence[Ids]]] = []

    def _prefill(self, ids: Ids) -> tuple[Any, Tensor]:
        return ids, self._run(ids)[-1:]

    def _rest_states(self, prefix: Any, num_prefix_tokens: int, rests: Sequence[Ids]) -> list[Tensor]:
        assert num_prefix_tokens == len(prefix)
        self.calls.append((prefix, rests))
        return [self._run([*prefix, *rest])[num_prefix_tokens:] for rest in rests]

    def _run(self, ids: Ids) -> Tensor:
        hidden_T_H: Tensor = self._trunk(input_ids=self._tensor([ids]), use_cache=False).last_hidden_state[0]
        return hidden_T_H


PROMPT = random_ids(9, seed=1)
SUFFIXES = [Suffix([7, 8, 5, 6], [1, 3]), Suffix([7, 8], [1]), Suffix([7, 8, 9], [2])]


def test_the_prompt_runs_with_the_common_lead_and_the_rests_on_top() -> None:
    forward = RecordingForward()
    forward.hidden_states(PROMPT, SUFFIXES)
    assert forward.calls == [([*PROMPT, 7, 8], [[5, 6], [9]])]


def test_hidden_states_are_those_at_the_positions() -> None:
    actual = RecordingForward().hidden_states(PROMPT, SUFFIXES)
    expected = IndependentForward(tiny_model()).hidden_states(PROMPT, SUFFIXES)
    assert_close(actual, expected, rtol=0, atol=1e-5)


def test_without_a_prompt_completions_run_independently() -> None:
    forward = RecordingForward()
    [actual_S_H] = forward.hidden_states([], [Suffix([7, 8], [0, 1])])
    [expected_S_H] = IndependentForward(tiny_model()).hidden_states([], [Suffix([7, 8], [0, 1])])
    assert torch.equal(actual_S_H, expected_S_H)
    assert forward.calls == []
