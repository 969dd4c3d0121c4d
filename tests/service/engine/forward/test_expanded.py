"""A batch on copies of the prompt's cache against independent forwards, and the number of tokens run."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import PreTrainedModel

from shopr1_service.engine.forward import expanded as expanded_forward
from shopr1_service.engine.forward.base import IndependentForward, Suffix
from shopr1_service.engine.forward.expanded import ExpandedForward, SteppedForward
from tests.support.models import FAMILIES, random_ids, shared_model, tiny_model

LEAD = [7, 8, 9]
"""The beginning of every completion."""


def suffix(num_tokens: int, *, seed: int = 0) -> Suffix:
    """A completion of the lead and `num_tokens` more, scored from the lead's end on."""
    ids = (*LEAD, *random_ids(num_tokens, seed=seed))
    return Suffix(ids, tuple(range(len(LEAD) - 1, len(ids))))


def check(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    suffixes: Sequence[Suffix],
    strategy: type[ExpandedForward] = ExpandedForward,
) -> None:
    actual = strategy(model).hidden_states(prompt_ids, suffixes)
    expected = IndependentForward(model).hidden_states(prompt_ids, suffixes)
    for actual_S_H, expected_S_H in zip(actual, expected, strict=True):
        assert_close(actual_S_H, expected_S_H, rtol=0, atol=1e-4)


def passes_of(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Rows and tokens of each pass from now on."""
    seen: list[tuple[int, ...]] = []

    def note(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


# --- the same numbers -------------------------------------------------------------------------------

GROUPS = st.tuples(
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=5),
)
EXPANDED = [name for name, family in FAMILIES.items() if family.forward in ("expanded", "branched")]
STEPPED = [name for name, family in FAMILIES.items() if family.forward == "stepped"]


@pytest.mark.parametrize(
    ("strategy", "family"),
    [
        *((ExpandedForward, name) for name in ("llama", "gemma3", *EXPANDED)),
        *((SteppedForward, name) for name in ("llama", "gemma3", *STEPPED)),
    ],
)
@given(group=GROUPS, max_tokens=st.sampled_from([1, 9, 8192]), max_cached=st.sampled_from([1, 40, 10**6]))
@settings(max_examples=10)
def test_any_group_in_any_batches(
    strategy: type[ExpandedForward],
    family: str,
    group: tuple[int, list[tuple[int, bool]]],
    max_tokens: int,
    max_cached: int,
) -> None:
    """Lengths in any order, leads, completions of one token and of none: results keep their order."""
    num_prompt_tokens, drawn = group
    suffixes = [
        suffix(length, seed=i) if has_lead else Suffix(random_ids(length, seed=i), (-1, length - 1))
        for i, (length, has_lead) in enumerate(drawn)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expanded_forward, "MAX_PASS_TOKENS", max_tokens)
        patch.setattr(expanded_forward, "MAX_CACHED_TOKENS", max_cached)
        check(shared_model(family), random_ids(num_prompt_tokens, seed=9), suffixes, strategy)


# --- every token once -------------------------------------------------------------------------------


def test_only_needed_tokens_are_run() -> None:
    model = tiny_model()
    passes = passes_of(model)
    ExpandedForward(model).hidden_states(random_ids(40), [suffix(5), suffix(0), suffix(2), suffix(4)])
    # The prompt with the lead, once; then the rests, as long as the longest.
    assert passes == [(1, 40 + 3), (3, 5)]


def test_one_token_is_padded_to_two_and_none_is_not_run() -> None:
    model = tiny_model()
    passes = passes_of(model)
    ExpandedForward(model).hidden_states(random_ids(40), [suffix(1, seed=1), suffix(0), suffix(1, seed=2)])
    ExpandedForward(model).hidden_states(random_ids(40), [suffix(0)])
    assert passes == [(1, 43), (2, 2), (1, 43)]


def test_copies_of_the_prompt_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expanded_forward, "MAX_CACHED_TOKENS", 80)
    model = tiny_model()
    passes = passes_of(model)
    suffixes = [suffix(n, seed=n) for n in (90, 5, 4, 6, 3, 30)]
    ExpandedForward(model).hidden_states(random_ids(20), suffixes)
    # 23 tokens and the completion's, each: two of them, or one of 30. Longer ones run alone.
    assert passes == [(1, 23), (2, 4), (2, 6), (1, 30), (1, 90)]


def test_tokens_of_a_pass_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expanded_forward, "MAX_PASS_TOKENS", 16)
    model = tiny_model()
    passes = passes_of(model)
    ExpandedForward(model).hidden_states(random_ids(20), [suffix(n, seed=n) for n in (30, 5, 4, 5, 8)])
    # Padding counts: three rows of 5, not five of 30.
    assert passes == [(1, 23), (3, 5), (1, 8), (1, 30)]


def test_steps_are_of_one_token() -> None:
    model = tiny_model()
    passes = passes_of(model)
    SteppedForward(model).hidden_states(random_ids(40), [suffix(3), suffix(0), suffix(1)])
    # The prompt with the lead, once; then a token of each at a time.
    assert passes == [(1, 43), (2, 1), (2, 1), (2, 1)]
    # A single completion shares nothing: steps would only be slow.
    SteppedForward(model).hidden_states(random_ids(40), [suffix(3)])
    assert passes[4:] == [(1, 46)]
