"""Scores where RoPE depends on the length, against full forwards of each rollout on fresh models in fp64."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from shopr1_rewards.recipe import Divergence
from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup
from shopr1_service.engine.engine import Engine
from shopr1_service.engine.forward.base import Forward, IndependentForward, Suffix
from shopr1_service.engine.forward.by_length import ByLengthForward
from shopr1_service.engine.forward.expanded import ExpandedForward
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.lm_head import ModuleHead
from shopr1_service.engine.prefix_cache import PrefixCache
from shopr1_service.engine.rope_scaling import LengthDependentRope
from tests.support.models import NUM_ROWS, NUM_TOKENS, naive, random_ids, rules, tiny_model

LIMIT = 32
"""Tokens of the longest sequence with the first frequencies."""
LEAD = [7, 8, 9]
TOLERANCE_NATS = 1e-4

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": LIMIT,
}


def of_long_rope(kind: str, **options: Any) -> PreTrainedModel:
    return tiny_model(kind, rope_parameters=LONG, original_max_position_embeddings=LIMIT, **options)


def of_two_kinds() -> PreTrainedModel:
    """Layers with a window rotate by static frequencies, the others by dynamic ones."""
    static = {"rope_type": "default", "rope_theta": 1e4}
    return tiny_model(
        "gemma3_text",
        head_dim=8,
        max_position_embeddings=LIMIT,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": static, "full_attention": DYNAMIC},
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "dynamic": lambda: tiny_model(rope_parameters=DYNAMIC, max_position_embeddings=LIMIT),
    "longrope": lambda: of_long_rope("llama"),
    "phi3": lambda: of_long_rope("phi3", sliding_window=8),
    "two kinds": of_two_kinds,
}
STRATEGIES: dict[str, Callable[[PreTrainedModel, PrefixCache], Forward]] = {
    "shared_prefix": SharedPrefixForward,
    "expanded": lambda model, _: ExpandedForward(model),
    "independent": lambda model, _: IndependentForward(model),
}
PATHS = [
    *(("shared_prefix", name) for name in ("dynamic", "longrope")),
    *((strategy, name) for strategy in ("expanded", "independent") for name in MODELS),
]


@functools.cache
def fresh(name: str) -> PreTrainedModel:
    """A model that has never been run."""
    return MODELS[name]()


@functools.cache
def expected(name: str, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
    """KL(U‖p) of each token, from the full logits of a fresh model."""
    model = copy.deepcopy(fresh(name)).double()
    with torch.no_grad():
        logits_T_V = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
    return naive(logits_T_V[len(prompt) - 1 : -1], Divergence.KL_U_P)


class Scorer:
    """An engine with one strategy, which compares every value with the expected one."""

    def __init__(self, strategy: str, name: str, max_cached_bytes: int = 10**9) -> None:
        self.name = name
        self.model = copy.deepcopy(fresh(name))
        self.cache = PrefixCache(max_cached_bytes)
        rope = LengthDependentRope.of(self.model)
        assert rope is not None
        self._engine = Engine(
            ByLengthForward(STRATEGIES[strategy](self.model, self.cache), rope),
            ModuleHead(self.model, NUM_ROWS),  # runs the model, too
            max_sequence_tokens=512,
            num_tokenizer_tokens=NUM_TOKENS,
            rope=rope,
        )

    def check(self, *groups: TokenGroup) -> None:
        results = self._engine.certainties(groups, rules())
        for group, own in zip(groups, results, strict=True):
            for completion, result in zip(group.completions, own, strict=True):
                assert isinstance(result, Certainty)
                of_all = expected(self.name, tuple(group.prompt_ids), tuple(completion.ids))
                of_measured = [of_all[index] for index in completion.measured]
                assert result.values == pytest.approx(of_measured, rel=0, abs=TOLERANCE_NATS)


def completion(num_tokens: int, seed: int = 1, *, num_unmeasured: int = 0) -> CompletionTokens:
    """A completion whose last tokens, such as the action's, are not measured."""
    ids = [*LEAD, *random_ids(num_tokens - len(LEAD), seed=seed)]
    return CompletionTokens(ids, range(len(LEAD), num_tokens - num_unmeasured))


def group(num_prompt_tokens: int, *completions: CompletionTokens) -> TokenGroup:
    return TokenGroup(PromptKey(tuple(random_ids(num_prompt_tokens, seed=5))), completions)


SHORT, LONGER, LONGEST = completion(6), completion(12), completion(30)
"""On a prompt of 24 tokens: below the limit, beyond it, far beyond it."""


def test_the_reference_depends_on_the_length() -> None:
    """Otherwise no test here could fail."""
    prompt, ids = tuple(random_ids(24, seed=5)), tuple(LONGEST.ids)
    for name in MODELS:
        whole = expected(name, prompt, ids)
        assert expected(name, prompt, ids[:6]) != pytest.approx(whole[:6], rel=0, abs=10 * TOLERANCE_NATS)


@pytest.mark.parametrize(("strategy", "name"), PATHS)
class TestEachPath:
    def test_earlier_groups_do_not_matter(self, strategy: str, name: str) -> None:
        scorer = Scorer(strategy, name)
        for num_prompt_tokens in (20, 80, 20, 31, 32, 33, 24):
            scorer.check(group(num_prompt_tokens, SHORT, completion(6, seed=2)))

    @pytest.mark.parametrize(
        "completions", [(SHORT, LONGER, LONGEST), (LONGEST, LONGER, SHORT), (LONGER, SHORT, LONGEST)]
    )
    def test_order_within_a_group(
        self, strategy: str, name: str, completions: Sequence[CompletionTokens]
    ) -> None:
        scorer = Scorer(strategy, name)
        scorer.check(group(24, *completions))
        scorer.check(group(24, *completions))

    def test_groups_together(self, strategy: str, name: str) -> None:
        groups = [group(24, SHORT, LONGEST), group(60, SHORT), group(24, LONGER), group(5, SHORT)]
        Scorer(strategy, name).check(*groups)
        Scorer(strategy, name).check(*reversed(groups))

    def test_tokens_that_are_not_measured_count(self, strategy: str, name: str) -> None:
        # Fed are 27 tokens or fewer; the sequences have 30, 36 and 54.
        cut = [completion(n, num_unmeasured=n - 4) for n in (6, 12, 30)]
        scorer = Scorer(strategy, name)
        scorer.check(group(24, *cut))
        for one in cut:
            scorer.check(group(24, one))

    def test_a_prompt_is_first_short_then_long(self, strategy: str, name: str) -> None:
        scorer = Scorer(strategy, name)
        for one in (SHORT, LONGEST, SHORT, LONGER):
            scorer.check(group(24, one))
            scorer.check(group(30, one))  # begins with the other prompt


GROUPS = st.lists(
    st.builds(
        lambda num_prompt, lengths: group(num_prompt, *(completion(*length) for length in lengths)),
        st.sampled_from([1, 20, 24, 29, 40]),
        st.lists(st.tuples(st.sampled_from([4, 6, 9, 12]), st.integers(1, 2)), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
@given(batches=st.lists(GROUPS, min_size=1, max_size=3), max_cached_bytes=st.sampled_from([0, 10**4, 10**9]))
@settings(max_examples=15)
def test_any_groups_in_any_order(name: str, batches: list[list[TokenGroup]], max_cached_bytes: int) -> None:
    scorer = Scorer("shared_prefix", name, max_cached_bytes)
    for batch in batches:
        scorer.check(*batch)


# --- shared prompts ---------------------------------------------------------------------------------


class Passes:
    """A shared-prefix strategy, and the number of tokens of each of its passes."""

    def __init__(self, name: str) -> None:
        model = copy.deepcopy(fresh(name))
        rope = LengthDependentRope.of(model)
        assert rope is not None
        self.cache = PrefixCache(10**9)
        self._forward = ByLengthForward(SharedPrefixForward(model, self.cache), rope)
        self._nums: list[int] = []
        model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        self._nums.append(kwargs["input_ids"].shape[1])

    def of(self, num_prompt_tokens: int, *nums_own_tokens: int) -> list[int]:
        """The passes of a group of completions of these lengths."""
        suffixes = [Suffix(random_ids(num, seed=num), [0, num - 1]) for num in nums_own_tokens]
        self._forward.hidden_states(random_ids(num_prompt_tokens, seed=5), suffixes)
        nums, self._nums = self._nums, []
        return nums


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_completions_within_the_limit_share_their_prompt(name: str) -> None:
    passes = Passes(name)
    assert passes.of(20, 4, 6, 12) == [20, 22]
    assert passes.of(20, 5, 7) == [12]  # the prompt is cached


def test_completions_beyond_the_limit_of_long_rope_share_their_prompt() -> None:
    passes = Passes("longrope")
    assert passes.of(40, 4, 6, 12) == [40, 22]
    assert passes.of(40, 5, 7) == [12]


def test_a_group_on_both_sides_of_the_limit_runs_its_prompt_twice() -> None:
    passes = Passes("longrope")
    assert passes.of(24, 4, 20, 6, 22) == [24, 10, 24, 42]
    assert passes.of(24, 22, 6) == [22, 6]


def test_beyond_the_limit_of_dynamic_rope_only_equal_lengths_share_their_prompt() -> None:
    passes = Passes("dynamic")
    # A single completion's first token is run with the prompt.
    assert passes.of(40, 4, 6, 8) == [41, 3, 41, 5, 41, 7]
    assert passes.of(40, 4, 6, 8) == [41, 3, 41, 5, 41, 7]
    # Keys that no other length could use are not kept.
    assert passes.cache.stats.num_bytes == 0
