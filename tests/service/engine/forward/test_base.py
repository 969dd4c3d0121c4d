import copy
from collections.abc import Sequence
from itertools import permutations, product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from shopr1_service.engine.forward.base import (
    Forward,
    IndependentForward,
    Suffix,
    batches,
    common_lead,
    token_tensor,
)
from shopr1_service.engine.forward.expanded import ExpandedForward
from tests.support.models import model_of, random_ids, shared_model, tiny_model


@torch.no_grad()
def slow_hidden(double: PreTrainedModel, prompt_ids: Sequence[int], suffix: Suffix) -> Tensor:
    """Hidden states from an fp64 model's own list of them; the last is the trunk's output."""
    ids = torch.tensor([[*prompt_ids, *suffix.ids]])
    hidden_T_H = double(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0]
    return torch.stack([hidden_T_H[len(prompt_ids) + position] for position in suffix.positions])


def check(forward: Forward, model: PreTrainedModel, prompt_ids: list[int], suffixes: list[Suffix]) -> None:
    actual = forward.hidden_states(prompt_ids, suffixes)
    double = copy.deepcopy(model).double()
    for hidden_S_H, suffix in zip(actual, suffixes, strict=True):
        expected_S_H = slow_hidden(double, prompt_ids, suffix)
        assert_close(hidden_S_H.double(), expected_S_H, rtol=0, atol=1e-4)


# --- helpers ----------------------------------------------------------------------------------------


def test_token_tensor() -> None:
    ids_2_T = token_tensor([[1, 2, 3], (4, 5, 6)], torch.device("cpu"))
    assert ids_2_T.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert ids_2_T.dtype == torch.long


@pytest.mark.parametrize(
    ("items", "expected"),
    [([], []), ([2, 3, 1], [[2, 3], [1]]), ([9, 1, 4], [[9], [1, 4]]), ([5, 9], [[5], [9]])],
)
def test_batches_that_fit(items: list[int], expected: list[list[int]]) -> None:
    assert list(batches(items, lambda batch: sum(batch) <= 5)) == expected


@pytest.mark.parametrize(
    ("suffixes", "expected"),
    [
        ([Suffix([1, 2, 3], [2])], [1, 2, 3]),
        ([Suffix([1, 2, 3], [0, 2])], [1]),  # up to the first requested position
        ([Suffix([1, 2, 3], [2]), Suffix([1, 2, 4], [2])], [1, 2]),
        ([Suffix([1, 2, 3], [2]), Suffix([1, 2, 3], [0])], [1]),
        ([Suffix([1, 2], [1]), Suffix([], [-1])], []),
    ],
)
def test_common_lead(suffixes: list[Suffix], expected: list[int]) -> None:
    assert common_lead(suffixes) == expected


# --- every strategy gives the model's hidden states ------------------------------------------------------

Strategy = type[IndependentForward | ExpandedForward]
FORWARDS = pytest.mark.parametrize("strategy", [IndependentForward, ExpandedForward])

SUFFIXES = [
    Suffix([], [-1]),
    Suffix(random_ids(1, seed=1), [0]),
    Suffix(random_ids(1, seed=1), [-1, 0]),
    Suffix(random_ids(2, seed=2), [1]),
    Suffix(random_ids(9, seed=3), [0, 3, 4, 8]),
    Suffix(random_ids(9, seed=3), [0, 3, 4, 8]),
    Suffix(random_ids(20, seed=4), list(range(-1, 20))),
]


@pytest.mark.parametrize(
    ("strategy", "family"),
    [
        *product((IndependentForward, ExpandedForward), ("llama", "mistral", "gemma3", "gpt2")),
        *product((IndependentForward, ExpandedForward), ("bamba", "falcon_h1", "mamba2", "mpt")),
    ],
)
@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 7, 8, 9, 30])
def test_hidden_states(strategy: Strategy, family: str, num_prompt_tokens: int) -> None:
    model = shared_model(family)
    check(strategy(model), model, random_ids(num_prompt_tokens, seed=num_prompt_tokens), SUFFIXES)


@FORWARDS
def test_empty_prompt(strategy: Strategy) -> None:
    model = tiny_model()
    check(strategy(model), model, [], [Suffix(random_ids(5, seed=1), [0, 4]), Suffix([7], [0])])


@FORWARDS
def test_no_suffixes(strategy: Strategy) -> None:
    assert strategy(tiny_model()).hidden_states(random_ids(5), []) == []


@pytest.mark.parametrize(
    ("strategy", "family"),
    [
        *product((IndependentForward, ExpandedForward), ("llama", "mistral")),
        *product((IndependentForward, ExpandedForward), ("falcon_h1",)),
    ],
)
def test_suffixes_do_not_affect_each_other(strategy: Strategy, family: str) -> None:
    # If the prompt's cache were written to, the second suffix would follow the first.
    forward = strategy(model_of(family))
    prompt_ids = random_ids(12, seed=5)
    alone = [forward.hidden_states(prompt_ids, [suffix])[0] for suffix in SUFFIXES[3:6]]
    for order in permutations(range(3)):
        together = forward.hidden_states(prompt_ids, [SUFFIXES[3:6][i] for i in order])
        for hidden_S_H, i in zip(together, order, strict=True):
            assert_close(hidden_S_H, alone[i], rtol=0, atol=1e-5)


@FORWARDS
def test_hidden_states_need_no_gradient(strategy: Strategy) -> None:
    model = tiny_model()
    [hidden_S_H] = strategy(model).hidden_states(random_ids(5), [Suffix(random_ids(3), [-1, 2])])
    assert not hidden_S_H.requires_grad
