"""Completions in one row against independent forwards, and the number of tokens run."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import Cache, PreTrainedModel

from shopr1_service.engine.forward import packed as packed_forward
from shopr1_service.engine.forward.base import IndependentForward, Suffix
from shopr1_service.engine.forward.packed import PackedForward, UnsupportedLayoutError
from shopr1_service.engine.forward.self_check import choose_forward
from tests.support.models import (
    FAMILIES,
    embedding_of,
    llama4,
    model_of,
    random_ids,
    shared_model,
    tiny_model,
)

LEAD = [7, 8, 9]
"""The beginning of every completion."""
BROKEN_ID = 380
"""A token id that `random_ids` never gives."""


def suffix(num_tokens: int, *, seed: int = 0) -> Suffix:
    """A completion of the lead and `num_tokens` more, scored from the lead's end on."""
    ids = (*LEAD, *random_ids(num_tokens, seed=seed))
    return Suffix(ids, tuple(range(len(LEAD) - 1, len(ids))))


def check(model: PreTrainedModel, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> None:
    actual = PackedForward(model).hidden_states(prompt_ids, suffixes)
    expected = IndependentForward(model).hidden_states(prompt_ids, suffixes)
    for actual_S_H, expected_S_H in zip(actual, expected, strict=True):
        assert_close(actual_S_H, expected_S_H, rtol=0, atol=1e-4)


class Passes:
    """Records each pass of a model: its new tokens and its cached tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.seen: list[tuple[int, int]] = []
        model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: object, _args: object, kwargs: dict[str, torch.Tensor | Cache]) -> None:
        input_ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        assert isinstance(input_ids, torch.Tensor)
        self.seen.append((input_ids.numel(), cache.get_seq_length() if isinstance(cache, Cache) else 0))


# --- the same numbers -------------------------------------------------------------------------------

GROUPS = st.tuples(
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=5),
)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "gpt_oss", "deepseek_v3", "opt"])
@given(group=GROUPS, max_tokens=st.sampled_from([1, 9, 8192]), max_elements=st.sampled_from([1, 200, 10**6]))
@settings(max_examples=15)
def test_any_group_in_any_passes(
    family: str, group: tuple[int, list[tuple[int, bool]]], max_tokens: int, max_elements: int
) -> None:
    """Windows of 8 tokens that end in the prompt and beyond it, leads, completions that end with the lead."""
    num_prompt_tokens, drawn = group
    suffixes = [
        suffix(length, seed=i) if has_lead else Suffix(random_ids(length, seed=i), (-1, length - 1))
        for i, (length, has_lead) in enumerate(drawn)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_forward, "MAX_PASS_TOKENS", max_tokens)
        patch.setattr(packed_forward, "MAX_MASK_ELEMENTS", max_elements)
        check(shared_model(family), random_ids(num_prompt_tokens, seed=9), suffixes)


@pytest.mark.parametrize("num_prompt_tokens", [1, 7, 8, 9, 14, 21])
def test_chunked_attention(num_prompt_tokens: int) -> None:
    model = llama4(attn_temperature_tuning=False)
    check(model, random_ids(num_prompt_tokens), [suffix(12, seed=1), suffix(3, seed=2), suffix(1, seed=3)])


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # sdpa and eager attention
def test_bfloat16(family: str) -> None:
    model = tiny_model(FAMILIES[family].kind, torch.bfloat16, **FAMILIES[family].options)
    ids = random_ids(32, seed=1)
    assert choose_forward(model, ids, [PackedForward(model)]).forward.name == "packed"


# --- every token once -------------------------------------------------------------------------------


def test_only_needed_tokens_are_run() -> None:
    model = tiny_model()
    passes = Passes(model)
    PackedForward(model).hidden_states(random_ids(40), [suffix(5), suffix(0), suffix(2, seed=1), suffix(5)])
    # The prompt with the lead, once; then the rests, on top of it.
    assert passes.seen == [(40 + 3, 0), (5 + 2 + 5, 43)]


def test_the_lead_is_no_pass_of_its_own() -> None:
    model = tiny_model()
    passes = Passes(model)
    PackedForward(model).hidden_states(random_ids(40), [suffix(0), Suffix(LEAD[:1], (0,))])
    assert passes.seen == [(40 + 1, 0), (2, 41)]
    passes.seen.clear()
    PackedForward(model).hidden_states(random_ids(40), [suffix(0)])
    assert passes.seen == [(40 + 3, 0)]


@pytest.mark.parametrize(("name", "limit"), [("MAX_PASS_TOKENS", 16), ("MAX_MASK_ELEMENTS", 16 * (23 + 16))])
def test_passes_are_bounded(monkeypatch: pytest.MonkeyPatch, name: str, limit: int) -> None:
    monkeypatch.setattr(packed_forward, name, limit)
    model = tiny_model()
    passes = Passes(model)
    PackedForward(model).hidden_states(random_ids(20), [suffix(n, seed=n) for n in (7, 9, 1, 30, 16, 16)])
    # A rest larger than a pass runs alone. No pass changes the cache for the next.
    assert passes.seen == [(23, 0), (7 + 9, 23), (1, 23), (30, 23), (16, 23), (16, 23)]


def test_mask_is_bounded_for_the_longest_prompts() -> None:
    assert packed_forward.MAX_MASK_ELEMENTS // 32_768 >= 2000  # tokens of a pass after 32k tokens
    assert packed_forward.MAX_MASK_ELEMENTS <= 2**26


# --- refusals and failures --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_a_broken_completion_affects_no_other(family: str) -> None:
    model = model_of(family)
    embedding_of(model).weight[BROKEN_ID] = math.nan
    prompt_ids, sound = random_ids(20), [suffix(4, seed=1), suffix(6, seed=2)]
    broken = Suffix((*LEAD, 5, BROKEN_ID, 6), (2, 5))
    first, nan, second = PackedForward(model).hidden_states(prompt_ids, [sound[0], broken, sound[1]])
    assert nan[0].isfinite().all()
    assert nan[1].isnan().all()
    expected = IndependentForward(model).hidden_states(prompt_ids, sound)
    assert_close([first, second], expected, rtol=0, atol=1e-4)
    check(model, prompt_ids, sound)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "mine"])
def test_attention_that_may_ignore_a_mask_is_refused(implementation: str) -> None:
    model = tiny_model()
    passes = Passes(model)
    model.config._attn_implementation = implementation
    with pytest.raises(UnsupportedLayoutError, match=f"{implementation} may ignore a mask"):
        PackedForward(model).hidden_states(random_ids(20), [suffix(1)])
    assert passes.seen == []


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mamba", "a mask means nothing to linear_attention"),
        ("openai_gpt", "does not use the cache"),
        ("recurrent_gemma", "a mask means nothing to"),
        ("falcon_h1", "a mask means nothing to hybrid"),
        ("qwen3_next", "a mask means nothing to linear_attention"),
    ],
)
def test_models_with_other_layers_are_refused(family: str, message: str) -> None:
    with pytest.raises(UnsupportedLayoutError, match=message):
        PackedForward(model_of(family)).hidden_states(random_ids(20), [suffix(1)])


def test_positions_that_count_cached_tokens_are_refused() -> None:
    # In real models wrong only from the 8192nd token on: no check at load would notice.
    model = llama4(floor_scale=8192)
    with pytest.raises(UnsupportedLayoutError, match="scaled by something else than their position"):
        PackedForward(model).hidden_states(random_ids(20), [suffix(1)])
