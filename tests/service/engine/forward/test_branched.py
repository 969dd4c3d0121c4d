"""Completions on copies of the prompt's states, against a copy of the model in fp64, and the tokens run."""

import copy
import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from shopr1_service.engine.forward import branched as branched_forward
from shopr1_service.engine.forward.base import PromptGroup, Suffix
from shopr1_service.engine.forward.branched import BranchedForward, has_states
from shopr1_service.engine.prefix_cache import PrefixCache
from tests.support.models import FAMILIES, embedding_of, model_of, random_ids, shared_model

BRANCHED = [name for name, family in FAMILIES.items() if family.forward == "branched"]
LEAD = (7, 8, 9)
BROKEN_ID = 380
"""A token id that `random_ids` never gives."""


def suffix(num_tokens: int, *, seed: int = 0) -> Suffix:
    """A completion of the lead and `num_tokens` more, scored from the lead's end on."""
    ids = (*LEAD, *random_ids(num_tokens, seed=seed))
    return Suffix(ids, tuple(range(len(LEAD) - 1, len(ids))))


@functools.cache
def double(family: str) -> PreTrainedModel:
    model = copy.deepcopy(shared_model(family)).double()
    model.set_experts_implementation("eager")  # grouped products know no fp64
    return model


@functools.cache
def expected(family: str, ids: tuple[int, ...]) -> Tensor:
    """The hidden states of a whole sequence, from the fp64 model's own list of them."""
    with torch.no_grad():
        output = double(family)(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return output.hidden_states[-1][0]  # type: ignore[no-any-return]


def check(family: str, forward: BranchedForward, *groups: PromptGroup) -> None:
    for group, states in zip(groups, forward.batch(groups), strict=True):
        for own, actual_S_H in zip(group.suffixes, states, strict=True):
            rows = [len(group.prompt_ids) + position for position in own.positions]
            expected_S_H = expected(family, (*group.prompt_ids, *own.ids))[rows]
            assert_close(actual_S_H.double(), expected_S_H, rtol=0, atol=1e-4)


def passes_of(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Rows and tokens of each pass from now on."""
    seen: list[tuple[int, ...]] = []

    def note(_module: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


# --- the same numbers -------------------------------------------------------------------------------

LENGTHS = st.sampled_from([0, 1, 2, 12])
SUFFIXES = st.lists(
    st.tuples(LENGTHS, st.booleans()).map(
        lambda drawn: (
            suffix(drawn[0])
            if drawn[1]
            else Suffix(tuple(random_ids(drawn[0], seed=1)), tuple({-1, drawn[0] - 1}))
        )
    ),
    min_size=1,
    max_size=3,
)
PROMPTS = st.lists(
    st.tuples(st.sampled_from([1, 2, 9, 20]), st.integers(0, 2), SUFFIXES).map(
        lambda drawn: PromptGroup((*random_ids(drawn[0], seed=9), *range(3, 3 + drawn[1])), drawn[2])
    ),
    min_size=1,
    max_size=3,
)
"""Prompts that begin alike, and continue each other or not."""


@pytest.mark.parametrize("family", BRANCHED)
@given(
    requests=st.lists(PROMPTS, min_size=1, max_size=2),
    max_bytes=st.sampled_from([0, 40_000, 10**9]),
    max_pass_tokens=st.sampled_from([3, 9, 8192]),
    max_rows=st.sampled_from([1, 3, 16]),
    max_padding=st.sampled_from([0, 5, 256]),
)
@settings(max_examples=10)
def test_any_requests_in_any_order(
    family: str,
    requests: list[list[PromptGroup]],
    max_bytes: int,
    max_pass_tokens: int,
    max_rows: int,
    max_padding: int,
) -> None:
    """Known prompts, longer and shorter ones, evictions, small passes: always the same numbers."""
    forward = BranchedForward(shared_model(family), PrefixCache(max_bytes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branched_forward, "MAX_PASS_TOKENS", max_pass_tokens)
        patch.setattr(branched_forward, "MAX_ROWS", max_rows)
        patch.setattr(branched_forward, "MAX_PADDING_TOKENS", max_padding)
        for groups in requests:
            check(family, forward, *groups)


def test_empty_prompts_run_independently() -> None:
    forward = BranchedForward(shared_model("lfm2"), PrefixCache(10**9))
    groups = [
        PromptGroup((), [Suffix((5, 6, 7), (0, 2)), Suffix((4,), (0,))]),
        PromptGroup((3, 4, 5), [suffix(2)]),
    ]
    check("lfm2", forward, *groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_states(family: str) -> None:
    # Those of recurrent_gemma are no part of the cache, though; rwkv has none.
    expected = FAMILIES[family].forward in ("branched", "stepped") or family == "recurrent_gemma"
    assert has_states(shared_model(family)) == expected


@torch.no_grad()
def test_a_broken_completion_affects_no_other() -> None:
    model = model_of("qwen3_next")
    embedding_of(model).weight[BROKEN_ID] = torch.nan
    forward = BranchedForward(model, PrefixCache(10**9))
    broken = Suffix((*LEAD, 5, BROKEN_ID, 6), (2, 5))
    sound = [suffix(4, seed=1), suffix(6, seed=2)]
    for _ in range(2):  # the states that are kept are not affected either
        first, nan, second = forward.hidden_states(random_ids(20), [sound[0], broken, sound[1]])
        assert nan[1].isnan().all()  # and those before it: the model's own chunks multiply NaN by 0
        for actual_S_H, own in zip((first, second), sound, strict=True):
            rows = [20 + position for position in own.positions]
            expected_S_H = expected("qwen3_next", (*random_ids(20), *own.ids))[rows]
            assert_close(actual_S_H.double(), expected_S_H, rtol=0, atol=1e-4)


# --- every token once -------------------------------------------------------------------------------


def test_only_new_tokens_are_run() -> None:
    model = model_of("qwen3_next")
    passes = passes_of(model)
    forward = BranchedForward(model, PrefixCache(10**9))
    prompt, suffixes = random_ids(40, seed=1), [suffix(5), suffix(0), suffix(2)]
    forward.hidden_states(prompt, suffixes)
    assert passes == [(1, 40), (3, 8)]
    forward.hidden_states(prompt, suffixes)  # the same prompt again
    forward.hidden_states([*prompt, *random_ids(10, seed=2)], suffixes[:1])  # the session's next step
    assert passes[2:] == [(3, 8), (1, 10), (1, 8)]
    # One token more: alone it would be a step, for which models have other code.
    forward.hidden_states([*prompt, *random_ids(11, seed=2)], suffixes[:1])
    assert passes[5:] == [(1, 11), (1, 8)]
    # A prompt that ends within a known one: there are no states.
    forward.hidden_states(prompt[:30], suffixes[:1])
    forward.hidden_states(prompt[:30], suffixes[:1])
    assert passes[7:] == [(1, 30), (1, 8), (1, 8)]
    # The known ones are not lost by it.
    forward.hidden_states(prompt, suffixes[:1])
    assert passes[10:] == [(1, 8)]


def test_prompts_that_begin_alike_are_all_kept() -> None:
    model = model_of("lfm2")
    passes = passes_of(model)
    forward = BranchedForward(model, PrefixCache(10**9))
    groups = [PromptGroup((*random_ids(9), *random_ids(8, seed=i)), [suffix(2)]) for i in (1, 2, 3)]
    for _ in range(2):
        check("lfm2", forward, *groups)
    assert passes == [(1, 17)] * 3 + [(3, 5)] * 2


def test_groups_that_are_not_kept() -> None:
    model = model_of("lfm2")
    passes = passes_of(model)
    forward = BranchedForward(model, PrefixCache(10**9))
    for _ in range(2):
        check("lfm2", forward, PromptGroup(random_ids(9), [suffix(2)], is_kept=False))
    assert passes == [(1, 9), (1, 5)] * 2


def test_rows_of_a_pass_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("lfm2")
    passes = passes_of(model)
    forward = BranchedForward(model, PrefixCache(10**9))
    prompt = random_ids(20)
    forward.hidden_states(prompt, [suffix(2, seed=i) for i in range(33)])
    assert passes == [(1, 20), (16, 5), (16, 5), (1, 5)]
    monkeypatch.setattr(branched_forward, "MAX_PASS_TOKENS", 24)
    monkeypatch.setattr(branched_forward, "MAX_PADDING_TOKENS", 3)
    passes.clear()
    forward.hidden_states(prompt, [suffix(n, seed=n) for n in (9, 1, 30, 3, 2, 9)])
    # 4, 6 and 5 tokens with 3 of padding; 12 and 12; one that is longer than a pass.
    assert passes == [(3, 6), (2, 12), (1, 33)]


def test_long_prompts_take_passes_of_equal_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branched_forward, "MAX_PASS_TOKENS", 16)
    model = model_of("qwen3_next")
    passes = passes_of(model)
    check("qwen3_next", BranchedForward(model, PrefixCache(0)), PromptGroup(random_ids(33), [suffix(2)]))
    assert passes == [(1, 11)] * 3 + [(1, 5)]  # the last is not a single token


# --- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1"])
def test_kept_states_own_their_memory(family: str) -> None:
    """Otherwise more is kept than is counted."""
    cache = PrefixCache(10**9)
    forward = BranchedForward(shared_model(family), cache)
    prompts = [random_ids(12, seed=1), random_ids(20, seed=1)]
    for prompt in prompts:
        forward.hidden_states(prompt, [suffix(2), suffix(3)])
    chunks = cache.match(prompts[1])
    assert [len(chunk) for chunk in chunks] == [12, 8]
    kept = [(*chunk.keys, *chunk.values, *(chunk.states or {}).values()) for chunk in chunks]
    assert all(chunk.states for chunk in chunks)
    for tensor in itertools.chain(*kept):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_completions_are_not_kept() -> None:
    cache = PrefixCache(10**9)
    forward = BranchedForward(shared_model("falcon_h1"), cache)
    prompt, own = random_ids(12), suffix(4)
    forward.hidden_states(prompt, [own])
    assert sum(map(len, cache.match([*prompt, *own.ids]))) == 12


def states_of(cache: PrefixCache, ids: Sequence[int]) -> list[Tensor]:
    return list((cache.match(ids)[-1].states or {}).values())


def test_kept_states_do_not_change() -> None:
    """Passes write to the states that they are given."""
    cache = PrefixCache(10**9)
    forward = BranchedForward(shared_model("qwen3_next"), cache)
    prompt = random_ids(12)
    forward.hidden_states(prompt, [suffix(4)])
    before = [state.clone() for state in states_of(cache, prompt)]
    forward.hidden_states(prompt, [suffix(4), suffix(6)])
    forward.hidden_states([*prompt, *random_ids(5)], [suffix(4)])
    for state, earlier in zip(states_of(cache, prompt), before, strict=True):
        assert torch.equal(state, earlier)
