import copy
import logging
from collections.abc import Sequence
from itertools import permutations, product
from typing import Any

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
    choose_forward,
    common_lead,
    token_tensor,
)
from shopr1_service.engine.forward.expanded import ExpandedForward
from shopr1_service.engine.forward.packed import PackedForward
from shopr1_service.engine.lm_head import trunk_of
from tests.support.models import FAMILIES, model_of, random_ids, shared_model, tiny_model

CHECK_IDS = random_ids(32, seed=9)  # windows here have 8 tokens


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

Strategy = type[IndependentForward | PackedForward | ExpandedForward]
FORWARDS = pytest.mark.parametrize("strategy", [IndependentForward, PackedForward, ExpandedForward])

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
        *product(
            (IndependentForward, PackedForward, ExpandedForward), ("llama", "mistral", "gemma3", "gpt2")
        ),
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
        *product((IndependentForward, PackedForward, ExpandedForward), ("llama", "mistral")),
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


# --- the choice -------------------------------------------------------------------------------------


def patched(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, change: Any) -> PreTrainedModel:
    """The model, whose trunk's forward is replaced by `change(forward, kwargs)`."""
    trunk = trunk_of(model)
    original = trunk.forward
    monkeypatch.setattr(trunk, "forward", lambda **kwargs: change(original, kwargs))
    return model


def is_suffix(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("past_key_values") is not None


def ignore_the_cache(forward: Any, kwargs: dict[str, Any]) -> Any:
    return forward(**{**kwargs, "past_key_values": None})


def ignore_the_mask(forward: Any, kwargs: dict[str, Any]) -> Any:
    return forward(**{**kwargs, "attention_mask": None})


def ignore_the_positions(forward: Any, kwargs: dict[str, Any]) -> Any:
    return forward(**{**kwargs, "position_ids": None})


def refuse_a_cache(forward: Any, kwargs: dict[str, Any]) -> Any:
    if is_suffix(kwargs):
        raise NotImplementedError("no cache")
    return forward(**kwargs)


def choose(
    model: PreTrainedModel,
    ids: Sequence[int],
    strategies: Sequence[type[PackedForward | ExpandedForward]] = (PackedForward, ExpandedForward),
) -> Forward:
    """Choose among the strategies that use the model's own cache."""
    return choose_forward(model, ids, [strategy(model) for strategy in strategies])


def make_no_cache(forward: Any, kwargs: dict[str, Any]) -> Any:
    output = forward(**kwargs)
    output.past_key_values = None
    return output


def wrong_with_a_cache(is_wrong: Any) -> Any:
    def change(forward: Any, kwargs: dict[str, Any]) -> Any:
        output = forward(**kwargs)
        if is_suffix(kwargs) and is_wrong(kwargs["input_ids"].shape[1]):
            output.last_hidden_state = output.last_hidden_state * 1.01
        return output

    return change


def nan_with_a_cache(forward: Any, kwargs: dict[str, Any]) -> Any:
    output = forward(**kwargs)
    if is_suffix(kwargs):
        output.last_hidden_state = output.last_hidden_state * torch.nan
    return output


BOTH = [PackedForward, ExpandedForward]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("strategy", BOTH)
def test_the_first_correct_strategy_is_chosen(
    strategy: type[PackedForward | ExpandedForward], family: str
) -> None:
    model = model_of(family)
    assert choose(model, CHECK_IDS).name == "packed"
    assert choose(model, CHECK_IDS, [strategy]).name == strategy.name


@pytest.mark.parametrize(
    ("strategies", "change"),
    [
        pytest.param(BOTH, ignore_the_cache, id="ignores_the_cache_silently"),
        pytest.param(BOTH, refuse_a_cache, id="refuses_a_cache"),
        pytest.param([PackedForward], ignore_the_mask, id="ignores_the_mask_silently"),
        pytest.param([PackedForward], ignore_the_positions, id="ignores_the_positions_silently"),
        pytest.param([ExpandedForward], make_no_cache, id="makes_no_cache"),
        pytest.param(BOTH, nan_with_a_cache, id="nan_with_a_cache"),
        pytest.param(BOTH, wrong_with_a_cache(lambda _num_tokens: True), id="one_percent_off"),
    ],
)
def test_independent_is_chosen_where_sharing_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    strategies: Sequence[type[PackedForward | ExpandedForward]],
    change: Any,
) -> None:
    model = patched(monkeypatch, tiny_model(), change)
    with caplog.at_level(logging.WARNING, "shopr1_service.engine.forward.base"):
        forward = choose(model, CHECK_IDS, strategies)
    assert forward.name == "independent"
    [record] = caplog.records
    assert "LlamaModel" in record.message or "LlamaForCausalLM" in record.message


# These use a cache of the prompt wrongly, without an error, in one layout or in both.
SILENTLY_WRONG = ["mpt", "gpt_neo", "recurrent_gemma", "mamba", "mamba2", "rwkv", "jamba", "minimax", "bloom"]
HYBRIDS = ["bamba", "falcon_h1", "lfm2", "granitemoehybrid", "nemotron_h", "qwen3_next"]


@pytest.mark.parametrize("family", SILENTLY_WRONG + HYBRIDS)
def test_the_chosen_strategy_is_correct(family: str) -> None:
    model = model_of(family)
    forward = choose(model, CHECK_IDS)
    assert forward.name == FAMILIES[family].forward
    for num_prompt_tokens in (1, 9, 30):
        prompt_ids = random_ids(num_prompt_tokens, seed=1)
        expected = IndependentForward(model).hidden_states(prompt_ids, SUFFIXES)
        for actual_S_H, expected_S_H in zip(
            forward.hidden_states(prompt_ids, SUFFIXES), expected, strict=True
        ):
            assert_close(actual_S_H, expected_S_H, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("strategy", "family"),
    [
        *product([PackedForward], ["mpt", "gpt_neo"]),
        *product([ExpandedForward], ["mamba", "jamba", "minimax"]),
    ],
)
def test_silent_errors_are_recognised(strategy: type[PackedForward | ExpandedForward], family: str) -> None:
    model = model_of(family)
    suffixes = [Suffix(random_ids(6, seed=1), [5]), Suffix(random_ids(6, seed=2), [5])]
    actual = strategy(model).hidden_states(CHECK_IDS, suffixes)  # no exception
    expected = IndependentForward(model).hidden_states(CHECK_IDS, suffixes)
    assert max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True)) > 0.1
    assert choose(model, CHECK_IDS, [strategy]).name == "independent"


def test_a_single_token_is_never_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Recurrent models have separate code for a step of one token; nemotron_h's is wrong for some tokens.
    model = tiny_model()
    suffixes = [Suffix([7], [-1, 0]), Suffix([8], [0])]
    expected = IndependentForward(model).hidden_states(CHECK_IDS, suffixes)
    change = wrong_with_a_cache(lambda num_tokens: num_tokens == 1)
    forward = choose(patched(monkeypatch, model, change), CHECK_IDS, [ExpandedForward])
    assert forward.name == "expanded"
    assert_close(forward.hidden_states(CHECK_IDS, suffixes), expected, rtol=0, atol=1e-5)


def test_a_cache_that_is_cut_to_a_window_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Right for any prompt of up to 11 tokens, wrong beyond: the check must be longer.
    def forget_the_start(forward: Any, kwargs: dict[str, Any]) -> Any:
        if is_suffix(kwargs):
            for layer in kwargs["past_key_values"].layers:
                layer.keys, layer.values = layer.keys[:, :, -11:], layer.values[:, :, -11:]
        return forward(**kwargs)

    model = patched(monkeypatch, tiny_model(), forget_the_start)
    # Prompts of 6 and 8 tokens, with a lead of up to 3.
    assert choose(model, CHECK_IDS[:12], [ExpandedForward]).name == "expanded"
    assert choose(model, CHECK_IDS, [ExpandedForward]).name == "independent"
