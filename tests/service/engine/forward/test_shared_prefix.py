"""The shared prefix against independent forwards, and the number of tokens that it runs."""

import functools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from shopr1_service.engine.attention import shared_prefix as shared_attention
from shopr1_service.engine.attention.matmul import MatmulAttention
from shopr1_service.engine.forward import shared_prefix as shared_forward
from shopr1_service.engine.forward.base import IndependentForward, PromptGroup, Suffix
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.prefix_cache import PrefixCache
from tests.support.models import model_of, random_ids, shared_model, tiny_model

LEAD = [7, 8, 9]
"""The beginning of every completion."""


def suffix(*rest: int, num_measured: int | None = None) -> Suffix:
    """A completion of the lead and scored tokens. The last token is predicted, not fed."""
    num_measured = len(rest) if num_measured is None else num_measured
    return Suffix((*LEAD, *rest[:-1]), tuple(range(len(LEAD) - 1, len(LEAD) - 1 + num_measured)))


LLAMA = shared_model("llama")


@functools.cache
def expected_of_llama(prompt: tuple[int, ...], suffix: Suffix) -> Tensor:
    return IndependentForward(LLAMA).hidden_states(prompt, [suffix])[0]


class Counting:
    """Counts the tokens that a model's trunk is given."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.passes: list[int] = []
        model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        self.passes.append(kwargs["input_ids"].shape[1])

    def take(self) -> list[int]:
        passes, self.passes = self.passes, []
        return passes


def check(
    forward: SharedPrefixForward, model: PreTrainedModel, prompt: list[int], suffixes: list[Suffix]
) -> None:
    actual = forward.hidden_states(prompt, suffixes)
    expected = IndependentForward(model).hidden_states(prompt, suffixes)
    for actual_S_H, expected_S_H in zip(actual, expected, strict=True):
        assert_close(actual_S_H, expected_S_H, rtol=0, atol=1e-4)


def assert_expected(actual: Sequence[Tensor], prompt: Sequence[int], suffixes: Sequence[Suffix]) -> None:
    for actual_S_H, suffix in zip(actual, suffixes, strict=True):
        assert_close(actual_S_H, expected_of_llama(tuple(prompt), suffix), rtol=0, atol=1e-4)


SUFFIXES = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.booleans()).map(
        lambda drawn: suffix(*drawn[0]) if drawn[1] else Suffix(tuple(drawn[0]), (-1, len(drawn[0]) - 1))
    ),
    min_size=1,
    max_size=4,
)
MAX_BYTES = st.sampled_from([0, 6_000, 14_000, 10**9])
"""Room for no chunk, for one, for a few, and for all."""
GROUPS = st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=9), SUFFIXES), min_size=1, max_size=6)


@given(
    groups=GROUPS,
    max_bytes=MAX_BYTES,
    max_pass_tokens=st.sampled_from([1, 3, 8192]),
    is_matmul=st.booleans(),
)
@settings(max_examples=60)
def test_any_requests_in_any_order(
    groups: list[tuple[list[int], list[Suffix]]], max_bytes: int, max_pass_tokens: int, is_matmul: bool
) -> None:
    """Common beginnings of prompts, leads that are cut, evictions, small passes: always the same numbers."""
    forward = SharedPrefixForward(LLAMA, PrefixCache(max_bytes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_forward, "MAX_PASS_TOKENS", max_pass_tokens)
        if is_matmul:
            patch.setattr(shared_attention, "choose_kernel", lambda segments, *_: MatmulAttention(segments))
        for prompt, suffixes in groups:
            usable = [s for s in suffixes if prompt or s.positions[0] >= 0]
            if usable:
                assert_expected(forward.hidden_states(prompt, usable), prompt, usable)


@given(
    batches=st.lists(GROUPS, min_size=1, max_size=3),
    max_bytes=MAX_BYTES,
    max_pass_tokens=st.sampled_from([1, 3, 8, 8192]),
    min_shared_tokens=st.sampled_from([1, 3, 64]),
)
@settings(max_examples=60)
def test_any_groups_together(
    batches: list[list[tuple[list[int], list[Suffix]]]],
    max_bytes: int,
    max_pass_tokens: int,
    min_shared_tokens: int,
) -> None:
    """Groups that share passes or beginnings, or are equal: each gets the numbers it would get alone."""
    forward = SharedPrefixForward(LLAMA, PrefixCache(max_bytes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_forward, "MAX_PASS_TOKENS", max_pass_tokens)
        patch.setattr(shared_forward, "MIN_SHARED_TOKENS", min_shared_tokens)
        for drawn in batches:
            groups = [PromptGroup(p, [s for s in ss if p or s.positions[0] >= 0]) for p, ss in drawn]
            groups = [group for group in groups if group.suffixes]
            for actual, group in zip(forward.batch(groups), groups, strict=True):
                assert_expected(actual, group.prompt_ids, group.suffixes)


def test_short_groups_share_their_passes() -> None:
    model = tiny_model()
    counting = Counting(model)
    forward = SharedPrefixForward(model, PrefixCache(10**9))
    groups = [PromptGroup(random_ids(10 + i, seed=i), [suffix(1, 2), suffix(3, 4, 5)]) for i in range(3)]
    forward.batch(groups)
    # 10, 11 and 12 tokens and three times the lead; then 1 + 2 tokens of each after it.
    assert counting.take() == [33 + 9, 9]
    forward.batch(groups)
    assert counting.take() == [9]


def test_prompts_with_a_common_beginning_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_forward, "MIN_SHARED_TOKENS", 20)
    model = tiny_model()
    counting = Counting(model)
    system = random_ids(30, seed=1)
    prompts = [[*system, *random_ids(5 + i, seed=10 + i)] for i in range(3)]
    steps = [*prompts, [*prompts[0], *random_ids(25, seed=20)]]
    groups = [PromptGroup(prompt, [suffix(1, 2)]) for prompt in steps]
    forward = SharedPrefixForward(model, PrefixCache(10**9))
    forward.batch(groups)
    # The whole first prompt; then the rests of the others; then the completions.
    assert counting.take() == [30 + 5 + 3, (6 + 3) + (7 + 3) + (25 + 3), 4]
    # Without a cache, no prompt waits.
    SharedPrefixForward(model, PrefixCache(0)).batch(groups)
    assert counting.take() == [38 + 39 + 40 + 63, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_new_tokens_are_run(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    counting = Counting(model)
    forward = SharedPrefixForward(model, PrefixCache(10**9))
    prompt = random_ids(40, seed=1)
    suffixes = [suffix(1, 2, 3), suffix(4, 5), suffix(6)]
    forward.hidden_states(prompt, suffixes)
    # The prompt with the lead; then all but the last token of each, after the lead: 2 + 1 + 0.
    assert counting.take() == [40 + 3, 3]
    forward.hidden_states(prompt, suffixes)
    assert counting.take() == [3]
    forward.hidden_states(prompt, [suffix(9)])
    assert counting.take() == []
    forward.hidden_states([*prompt, *random_ids(10, seed=2)], suffixes)  # the session's next step
    assert counting.take() == [10 + 3, 3]
    forward.hidden_states([*prompt[:30], *random_ids(5, seed=3)], suffixes)  # differs after 30 tokens
    assert counting.take() == [5 + 3, 3]
    forward.hidden_states(
        prompt[:20], [suffix(1)]
    )  # the beginning of a known one: one hidden state is missing
    assert counting.take() == [3]


def test_without_a_cache_the_prompt_is_still_run_once() -> None:
    model = tiny_model()
    counting = Counting(model)
    forward = SharedPrefixForward(model, PrefixCache(0))
    for _ in range(2):
        forward.hidden_states(random_ids(40, seed=1), [suffix(1, 2), suffix(3, 4)])
        assert counting.take() == [43, 2]


def test_passes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_forward, "MAX_PASS_TOKENS", 16)
    model = tiny_model()
    counting = Counting(model)
    forward = SharedPrefixForward(model, PrefixCache(10**9))
    forward.hidden_states(random_ids(40, seed=1), [suffix(*range(i, i + 8)) for i in range(5)])
    assert counting.take() == [16, 16, 11, 14, 14, 7]  # 43; then 7 each, two at a time


@pytest.mark.parametrize("num_groups", [1, 3])
def test_cached_chunks_own_their_memory(num_groups: int) -> None:
    """Otherwise more is kept than is counted."""
    cache = PrefixCache(10**9)
    forward = SharedPrefixForward(tiny_model(), cache)
    groups = [PromptGroup(random_ids(20, seed=i), [suffix(1, 2), suffix(3)]) for i in range(num_groups)]
    forward.batch(groups)
    for group in groups:
        chunks = cache.match([*group.prompt_ids, *LEAD])
        assert [len(chunk) for chunk in chunks] == [20, len(LEAD)]
        for tensor in (tensor for chunk in chunks for tensor in (*chunk.keys, *chunk.values)):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_completions_are_not_cached() -> None:
    cache = PrefixCache(10**9)
    forward = SharedPrefixForward(tiny_model(), cache)
    prompt = random_ids(40, seed=1)
    forward.hidden_states(prompt, [suffix(1, 2, 3), suffix(4, 5)])
    assert sum(map(len, cache.match([*prompt, *LEAD, 1, 2, 3]))) == 43


@pytest.mark.parametrize("family", ["falcon", "gptj"])
def test_a_model_without_the_attention_interface_is_left_as_it_was(family: str) -> None:
    model = model_of(family)
    forward = SharedPrefixForward(model, PrefixCache(0))
    with pytest.raises((TypeError, ValueError)):
        forward.hidden_states(random_ids(20, seed=1), [suffix(1, 2)])
    # The model is unchanged.
    ids = torch.tensor([random_ids(20, seed=1)])
    assert model(input_ids=ids, use_cache=False).logits.isfinite().all()


def test_two_models_do_not_share_a_layout() -> None:
    first, second = tiny_model(), tiny_model("qwen3")
    forwards = [SharedPrefixForward(model, PrefixCache(10**6)) for model in (first, second)]
    prompt = random_ids(12, seed=4)
    for _ in range(2):
        for forward, model in zip(forwards, (first, second), strict=True):
            check(forward, model, prompt, [suffix(1, 2), suffix(3)])


def test_a_broken_completion_affects_no_other() -> None:
    model = tiny_model()
    broken_id = 99
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    with torch.no_grad():
        embeddings.weight[broken_id] = torch.nan
    forward = SharedPrefixForward(model, PrefixCache(10**9))
    prompt = random_ids(20, seed=1)
    assert broken_id not in prompt
    sound = [suffix(1, 2, 3), suffix(4, 5, 6)]
    first, broken, second = forward.hidden_states(prompt, [sound[0], suffix(1, broken_id, 3), sound[1]])
    assert not broken.isfinite().all()
    for actual, expected in zip(
        (first, second), IndependentForward(model).hidden_states(prompt, sound), strict=True
    ):
        assert_close(actual, expected, rtol=0, atol=1e-4)
    check(forward, model, prompt, sound)  # the cache is not affected either
