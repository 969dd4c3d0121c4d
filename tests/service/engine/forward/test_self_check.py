"""The check at load: causality, memory of earlier sequences, rounding, the choice of a strategy, its cost."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

from shopr1_service.engine.attention import shared_prefix as shared_attention
from shopr1_service.engine.forward import self_check
from shopr1_service.engine.forward.base import Forward, IndependentForward, Suffix
from shopr1_service.engine.forward.branched import BranchedForward
from shopr1_service.engine.forward.expanded import ExpandedForward, SteppedForward
from shopr1_service.engine.forward.reach import Reach
from shopr1_service.engine.forward.self_check import Cause, choose_forward
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.forward.unused_copy import unused_copy
from shopr1_service.engine.lm_head import UnsupportedModelError, choose_head, trunk_of
from shopr1_service.engine.prefix_cache import PrefixCache
from shopr1_service.engine.rope_scaling import LengthDependentRope
from shopr1_service.errors import PolicyError
from tests.support.broken_models import (
    ignore_the_cache,
    is_suffix,
    lengths_of,
    make_no_cache,
    nan_with_a_cache,
    patched,
    refuse_a_cache,
    wrong_with_a_cache,
)
from tests.support.models import FAMILIES, model_of, policy_of, random_ids, tiny_model

CHECK_IDS = random_ids(32, seed=9)  # windows here have 8 tokens
SUFFIXES = [
    Suffix([], [-1]),
    Suffix(random_ids(1, seed=1), [-1, 0]),
    Suffix(random_ids(9, seed=3), [0, 3, 4, 8]),
    Suffix(random_ids(20, seed=4), list(range(-1, 20))),
]


# --- the choice -------------------------------------------------------------------------------------


def choose(
    model: PreTrainedModel,
    ids: Sequence[int],
    strategies: Sequence[type[ExpandedForward]] = (ExpandedForward, SteppedForward),
) -> Forward:
    """Choose among the strategies that use the model's own cache."""
    return choose_forward(model, ids, [strategy(model) for strategy in strategies]).forward


BOTH = [ExpandedForward, SteppedForward]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("strategy", BOTH)
def test_the_first_correct_strategy_is_chosen(strategy: type[ExpandedForward], family: str) -> None:
    model = model_of(family)
    assert choose(model, CHECK_IDS).name == "expanded"
    assert choose(model, CHECK_IDS, [strategy]).name == strategy.name


@pytest.mark.parametrize(
    ("strategies", "change"),
    [
        pytest.param(BOTH, ignore_the_cache, id="ignores_the_cache_silently"),
        pytest.param(BOTH, refuse_a_cache, id="refuses_a_cache"),
        pytest.param(BOTH, make_no_cache, id="makes_no_cache"),
        pytest.param(BOTH, nan_with_a_cache, id="nan_with_a_cache"),
        pytest.param(BOTH, wrong_with_a_cache(lambda _num_tokens: True), id="one_percent_off"),
    ],
)
def test_independent_is_chosen_where_sharing_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    strategies: Sequence[type[ExpandedForward]],
    change: Any,
) -> None:
    model = patched(monkeypatch, tiny_model(), change)
    with caplog.at_level(logging.WARNING, "shopr1_service.engine.forward.self_check"):
        forward = choose(model, CHECK_IDS, strategies)
    assert forward.name == "independent"
    [record] = caplog.records
    assert "LlamaModel" in record.message or "LlamaForCausalLM" in record.message


# Some of these use a cache of the prompt wrongly, without an error.
SILENTLY_WRONG = ["mpt", "gpt_neo", "recurrent_gemma", "mamba", "mamba2", "rwkv", "jamba", "minimax", "bloom"]
HYBRIDS = ["bamba", "falcon_h1", "lfm2", "granitemoehybrid", "nemotron_h", "qwen3_next"]


@pytest.mark.parametrize("family", SILENTLY_WRONG + HYBRIDS)
def test_the_chosen_strategy_is_correct(family: str) -> None:
    model = model_of(family)
    candidates: list[Forward] = [
        BranchedForward(model, PrefixCache(10**9)),
        ExpandedForward(model),
        SteppedForward(model),
    ]
    forward = choose_forward(model, CHECK_IDS, candidates).forward
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
        *product([ExpandedForward], ["mamba", "jamba", "minimax"]),
        (SteppedForward, "nemotron_h"),
    ],
)
def test_silent_errors_are_recognised(strategy: type[ExpandedForward], family: str) -> None:
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


# --- causality --------------------------------------------------------------------------------------


def leak(first: int, *, from_length: int = 0) -> Any:
    """A trunk in which the last token changes the states from position `first` on, in long rows."""

    def change(forward: Any, kwargs: dict[str, Any]) -> Any:
        output = forward(**kwargs)
        states_1_T_H = output.last_hidden_state
        if states_1_T_H.shape[1] >= max(from_length, first + 1):
            states_1_T_H = states_1_T_H.clone()
            states_1_T_H[:, first:] += 0.5 * output.last_hidden_state[:, -1:]
            output.last_hidden_state = states_1_T_H
        return output

    return change


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is not causal: .* has is_decoder = false"):
        choose(tiny_model(kind, is_decoder=False), CHECK_IDS)
    assert choose(tiny_model(kind, is_decoder=True), CHECK_IDS).name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "first", "from_length"),
    [
        (24, 0, 0),
        (24, 16, 0),  # within the last of some blocks
        (300, 0, 200),  # in long rows alone
        (300, 280, 200),
    ],
)
def test_later_tokens_must_not_change_earlier_states(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_tokens: int, first: int, from_length: int
) -> None:
    model = patched(monkeypatch, tiny_model(dtype=dtype), leak(first, from_length=from_length))
    message = f"LlamaForCausalLM is not causal: .* from position {first} on"
    with pytest.raises(UnsupportedModelError, match=message):
        choose(model, random_ids(num_tokens, seed=9))


def sparse(**options: Any) -> PreTrainedModel:
    """A model whose indexer chooses 8 keys for each token."""
    return tiny_model(
        "deepseek_v32",
        **{
            **FAMILIES["deepseek_v3"].options,
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 32,
            **options,
        },
    )


def test_ties_among_chosen_keys_are_a_remark() -> None:
    # A score is Σ weight · ReLU(q · k): with a single head, half of the scores are 0.
    model = sparse(index_n_heads=1)
    verdict = choose_forward(model, random_ids(60, seed=9), [ExpandedForward(model)])
    assert verdict.forward.name == "independent"
    [remark] = verdict.remarks
    assert remark.startswith("its choice of 8 keys for each token breaks ties by the sequence's length")


# --- memory of earlier sequences --------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [24, 300])
def test_a_model_that_remembers_the_longest_sequence_is_refused(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    longest = 0

    def remember(forward: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal longest
        output = forward(**kwargs)
        num_own = output.last_hidden_state.shape[1]
        if longest >= num_tokens - 12 > num_own:
            output.last_hidden_state = output.last_hidden_state * 1.01
        longest = max(longest, num_own)
        return output

    model = patched(monkeypatch, tiny_model(), remember)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM remembers earlier sequences"):
        choose(model, random_ids(num_tokens, seed=9))


def turn_at(num_tokens: int) -> Any:
    """A hook that makes a trunk another model for good at the first sequence of up to so many tokens."""

    def turn(module: Any, _args: object, output: Any) -> Any:
        num_own = output.last_hidden_state.shape[1]
        module.has_turned = getattr(module, "has_turned", False) or num_own <= num_tokens
        if module.has_turned:
            output.last_hidden_state = output.last_hidden_state.flip(-1)
        return output

    return turn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "threshold"), [(24, 2), (24, 20), (300, 2), (300, 250)])
def test_a_model_that_a_shorter_sequence_changes_is_refused(
    dtype: torch.dtype, num_tokens: int, threshold: int
) -> None:
    model = tiny_model(dtype=dtype)
    trunk_of(model).register_forward_hook(turn_at(threshold))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is changed by the sequences that it"):
        choose(model, random_ids(num_tokens, seed=9))


def test_the_change_may_be_older_than_the_check() -> None:
    model = tiny_model()
    trunk_of(model).register_forward_hook(turn_at(10))
    unused = unused_copy(model)
    choose_head(model, torch.tensor([random_ids(8)]))
    with pytest.raises(UnsupportedModelError, match="is changed by the sequences"):
        choose_forward(model, random_ids(24, seed=9), [], unused=unused)


def big_bird(attention_type: str) -> PreTrainedModel:
    """BigBird with blocks of 4 tokens: its attention to some of them needs more than 28."""
    options: dict[str, Any] = {"block_size": 4, "num_random_blocks": 1, "attention_type": attention_type}
    return tiny_model("big_bird", is_decoder=True, **options)


def test_block_sparse_attention_that_becomes_full_is_refused() -> None:
    message = r"BigBirdForCausalLM is changed by .* set attention_type to that, or .* to at most 28$"
    with pytest.raises(PolicyError, match=message):
        policy_of(big_bird("block_sparse"))
    assert policy_of(big_bird("block_sparse"), max_sequence_tokens=28).info.forward == "expanded"
    assert policy_of(big_bird("original_full")).info.forward == "expanded"


# --- long sequences ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "num_long"), [(torch.float32, 3), (torch.bfloat16, 4)])
def test_few_passes_are_long(dtype: torch.dtype, num_long: int) -> None:
    model, ids, texts = tiny_model(dtype=dtype), random_ids(2000, seed=9), list[str]()
    seen = lengths_of(model)
    verdict = choose_forward(model, ids, [ExpandedForward(model)], texts.append)
    assert verdict.forward.name == "expanded"
    assert len([num for num in seen if num > 1000]) == num_long
    assert sum(num for num in seen if num <= 1000) < 8000
    # The progress names each kind of pass before it begins.
    names = [
        "independent, 1995 tokens",
        "independent, 2000 tokens",
        "rounding, 1995 tokens",
        "expanded, 1989 tokens",
    ]
    assert texts == [name for name in names if dtype is torch.bfloat16 or "rounding" not in name]


def test_the_progress_names_passes_beyond_a_rope_threshold() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model, texts = tiny_model(max_position_embeddings=300, rope_parameters=rope), list[str]()
    LengthDependentRope.of(model)
    seen = lengths_of(model)
    choose_forward(model, random_ids(324, seed=9), [], texts.append)
    long = [num for num in seen if num > 64]
    assert long == [306, 319, 319, 306]
    assert texts == [f"independent, {num} tokens" for num in long]


def test_no_pass_is_longer_than_the_ids() -> None:
    # A position table may end there.
    model = tiny_model()
    seen = lengths_of(model)
    choose(model, random_ids(200, seed=9))
    choose(model, random_ids(24, seed=9))
    assert max(seen) == 200


def test_a_strategy_that_is_wrong_about_long_prompts_alone_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forget_the_start(forward: Any, kwargs: dict[str, Any]) -> Any:
        if is_suffix(kwargs):
            for layer in kwargs["past_key_values"].layers:
                layer.keys, layer.values = layer.keys[:, :, -150:], layer.values[:, :, -150:]
        return forward(**kwargs)

    model = patched(monkeypatch, tiny_model(), forget_the_start)
    ids = random_ids(200, seed=9)
    assert choose(model, ids[:140], [ExpandedForward]).name == "expanded"
    [rejection] = choose_forward(model, ids, [ExpandedForward(model)]).rejected
    assert (rejection.path, rejection.cause) == ("expanded", Cause.DIFFERS)
    assert rejection.detail.startswith("hidden states differ by ")


def test_without_memory_for_the_longest_sequence_a_shorter_one_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_out(forward: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs["input_ids"].numel() > 600:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**kwargs)

    model = patched(monkeypatch, tiny_model("mistral", sliding_window=1900), run_out)
    verdict = choose_forward(model, random_ids(2000, seed=9), [ExpandedForward(model)])
    assert verdict.forward.name == "expanded"
    assert verdict.remarks == ("checked up to 500 tokens; its config names 1900",)


def test_eager_attention_of_long_sequences_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "MAX_EAGER_ELEMENTS", 4 * 300**2)  # 4 heads
    model = model_of("gemma2")
    model.config.sliding_window = 900
    seen = lengths_of(model)
    verdict = choose_forward(model, random_ids(1000, seed=9), [])
    assert max(seen) == 300
    assert verdict.remarks == ("checked up to 300 tokens; its config names 900",)


# --- sparse attention -------------------------------------------------------------------------------


def minimax_m3() -> PreTrainedModel:
    """Attention to 3 blocks of 8 keys."""
    return tiny_model(
        "minimax_m3_vl_text",
        head_dim=16,
        rotary_dim=8,
        layer_types=["full_attention", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "dense"],
        dense_intermediate_size=48,
        num_local_experts=4,
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=8,
        index_topk_blocks=3,
    )


@pytest.mark.parametrize("make", [minimax_m3, sparse])
def test_sparse_attention_never_becomes_dense(make: Any) -> None:
    model = make()
    verdict = choose_forward(
        model,
        random_ids(Reach.of(model).num_tokens + 24, seed=9),
        [SharedPrefixForward(model, PrefixCache(10**9)), ExpandedForward(model)],
    )
    assert verdict.rejected[0].path == "shared_prefix"
    assert verdict.rejected[0].cause is Cause.UNSUPPORTED
    for num_prompt_tokens in (5, 40, 150):
        prompt_ids = random_ids(num_prompt_tokens, seed=1)
        actual = verdict.forward.hidden_states(prompt_ids, SUFFIXES)
        expected = IndependentForward(copy.deepcopy(model)).hidden_states(prompt_ids, SUFFIXES)
        for actual_S_H, expected_S_H in zip(actual, expected, strict=True):
            assert_close(actual_S_H, expected_S_H, rtol=0, atol=1e-4)


# --- 16 bits ----------------------------------------------------------------------------------------

MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEP: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 28},
    "mixtral": {"num_hidden_layers": 8, **MIXTRAL},
    "mistral": {"num_hidden_layers": 12, "sliding_window": 8},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", DEEP)
def test_rounding_rejects_no_exact_strategy(kind: str, seed: int, dtype: torch.dtype) -> None:
    model = tiny_model(kind, dtype, **DEEP[kind])
    for strategy in BOTH:
        forward = choose(model, random_ids(32, seed=seed), [strategy])
        assert forward.name == strategy(model).name


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("strategy", BOTH)
def test_errors_show_through_rounding(
    monkeypatch: pytest.MonkeyPatch, kind: str, strategy: type[ExpandedForward]
) -> None:
    model = tiny_model(kind, torch.bfloat16, **DEEP[kind])
    model = patched(monkeypatch, model, ignore_the_cache)
    assert choose(model, CHECK_IDS, [strategy]).name == "independent"


def test_a_lost_window_shows_through_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    read = shared_attention._read_options
    monkeypatch.setattr(shared_attention, "_read_options", lambda *given: replace(read(*given), window=None))
    model = tiny_model("mistral", torch.bfloat16, sliding_window=8)
    forward = SharedPrefixForward(model, PrefixCache(10**9))
    assert choose_forward(model, CHECK_IDS, [forward]).forward.name == "independent"
