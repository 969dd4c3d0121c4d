import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shopr1_client.wire import Reason
from shopr1_rewards.self_certainty import Head
from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup, Unmeasurable
from shopr1_service.engine.engine import Engine
from shopr1_service.engine.forward.base import Forward, IndependentForward
from shopr1_service.engine.forward.expanded import ExpandedForward
from shopr1_service.engine.lm_head import LinearHead, ModuleHead, choose_head, trunk_of
from tests.support.models import (
    NUM_ROWS,
    NUM_TOKENS,
    Reference,
    embedding_of,
    head_of,
    random_ids,
    rules,
    tiny_model,
)

LIMIT = 40
PROMPT = random_ids(20, seed=1)
OTHERS = [CompletionTokens(random_ids(9, seed=2), [0, 4]), CompletionTokens(random_ids(9, seed=3), [7])]

POISON = 380
"""A token id that `random_ids` never gives."""


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model()


FORWARDS = pytest.mark.parametrize("strategy", [IndependentForward, ExpandedForward])
Strategy = type[IndependentForward | ExpandedForward]


def engine_of(
    model: PreTrainedModel, strategy: Strategy = ExpandedForward, head: Head | None = None
) -> Engine:
    return Engine(
        strategy(model),
        head or choose_head(model, torch.tensor([PROMPT])),
        max_sequence_tokens=LIMIT,
        num_tokenizer_tokens=NUM_TOKENS,
    )


def measure(
    engine: Engine,
    *completions: CompletionTokens,
    prompt_ids: Sequence[int] = PROMPT,
    **options: Any,
) -> list[Certainty | Unmeasurable]:
    return engine.certainties([TokenGroup(PromptKey(prompt_ids), completions)], rules(**options))[0]


def reasons(results: Sequence[Certainty | Unmeasurable]) -> list[Reason | None]:
    return [result.reason if isinstance(result, Unmeasurable) else None for result in results]


def assert_same(actual: Sequence[Certainty | Unmeasurable], *expected: Certainty | Unmeasurable) -> None:
    """Equal up to rounding: the number of rows of a matrix changes the order of its sums."""
    for one, other in zip(actual, expected, strict=True):
        assert isinstance(one, Certainty)
        assert isinstance(other, Certainty)
        assert one.values == pytest.approx(other.values, rel=1e-6)


def test_mean() -> None:
    assert Certainty((1.0, 2.0, 6.0)).mean == 3.0
    assert Certainty((0.1,) * 10).mean == 0.1  # a plain sum gives 0.9999999999999999


def test_no_completions(model: PreTrainedModel) -> None:
    assert measure(engine_of(model)) == []


# --- limits -----------------------------------------------------------------------------------------


@FORWARDS
@pytest.mark.parametrize(
    ("position", "last_measured", "is_too_long"),
    [
        # 20 tokens of prompt, limit 40. Token 20 is predicted by the 40th token, token 21 by the 41st.
        ("predict", 20, False),
        ("predict", 21, True),
        ("shifted", 19, False),
        ("shifted", 20, True),
    ],
)
def test_longest_sequence(
    model: PreTrainedModel, strategy: Strategy, position: str, last_measured: int, is_too_long: bool
) -> None:
    engine = engine_of(model, strategy)
    # Tokens after the last scored one are not fed and do not count.
    long = CompletionTokens(random_ids(100, seed=4), [2, last_measured])
    first, result, last = measure(engine, OTHERS[0], long, OTHERS[1], position=position)
    assert_same([first, last], *measure(engine, *OTHERS, position=position))
    assert reasons([first, result, last]) == [None, Reason.SEQUENCE_TOO_LONG if is_too_long else None, None]
    if isinstance(result, Unmeasurable):
        assert result.message == "41 tokens are needed, the policy takes 40"
    else:
        expected = Reference(model).values(PROMPT, long.ids, long.measured, rules(position=position))
        assert result.values == pytest.approx(expected, rel=0, abs=1e-4)


@pytest.mark.parametrize("num_prompt_tokens", [LIMIT, LIMIT + 1])
def test_longest_prompt(model: PreTrainedModel, num_prompt_tokens: int) -> None:
    # The first token is predicted by the prompt alone.
    prompt_ids = random_ids(num_prompt_tokens, seed=5)
    results = measure(
        engine_of(model),
        CompletionTokens([5, 6], [0]),
        CompletionTokens([5, 6], [0, 1]),
        prompt_ids=prompt_ids,
    )
    too_long = Reason.SEQUENCE_TOO_LONG
    assert reasons(results) == ([None, too_long] if num_prompt_tokens == LIMIT else [too_long, too_long])


@FORWARDS
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("measured", [[0], [1], [0, 1], [0, 1, 4]])
def test_as_many_tokens_as_the_model_has_positions(
    strategy: Strategy, kind: str, measured: list[int]
) -> None:
    # gpt2 and opt have a table of positions: one token too many is an error.
    sizes: dict[str, Any] = {"ffn_dim": 48, "word_embed_proj_dim": 32} if kind == "opt" else {}
    model = tiny_model(kind, max_position_embeddings=LIMIT, **sizes)
    prompt_ids = random_ids(LIMIT - measured[-1], seed=7)
    completion = CompletionTokens(random_ids(5, seed=8), measured)
    [result] = measure(engine_of(model, strategy), completion, prompt_ids=prompt_ids)
    expected = Reference(model).values(prompt_ids, completion.ids[: measured[-1]], measured, rules())
    assert isinstance(result, Certainty), result
    assert result.values == pytest.approx(expected, rel=0, abs=1e-4)


@FORWARDS
def test_nothing_precedes_the_first_token(model: PreTrainedModel, strategy: Strategy) -> None:
    engine = engine_of(model, strategy)
    ids = random_ids(5, seed=6)
    completions = [CompletionTokens(ids, measured) for measured in ([0], [0, 1], [1], [1, 4])]
    results = measure(engine, *completions, prompt_ids=[])
    assert reasons(results) == [Reason.NO_CONTEXT, Reason.NO_CONTEXT, None, None]
    # The distribution after a token always has a context: that token.
    shifted = measure(engine, *completions, prompt_ids=[], position="shifted")
    assert reasons(shifted) == [None] * 4
    # The distribution that predicts token 1 is the one after token 0.
    assert_same([results[2]], shifted[0])


# --- failures of the model --------------------------------------------------------------------------


@FORWARDS
@pytest.mark.parametrize("value", [math.nan, math.inf])
@torch.no_grad()
def test_broken_weights_give_no_number(model: PreTrainedModel, strategy: Strategy, value: float) -> None:
    engine = engine_of(model, strategy)
    for parameter in model.parameters():
        parameter.fill_(value)
    for divergence in ("kl_u_p", "kl_p_u", "eq3"):
        results = measure(engine, *OTHERS, divergence=divergence)
        assert reasons(results) == [Reason.NON_FINITE_LOGITS] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@torch.no_grad()
def test_one_broken_row_of_the_head_gives_no_number(model: PreTrainedModel, value: float) -> None:
    engine = engine_of(model)
    head_of(model).weight[POISON] = value
    assert reasons(measure(engine, *OTHERS)) == [Reason.NON_FINITE_LOGITS] * 2
    # Row 380 is padding: the tokenizer has 371 tokens.
    assert reasons(measure(engine, *OTHERS, vocabulary="tokenizer")) == [None, None]


@FORWARDS
@torch.no_grad()
def test_nan_in_one_rollout_does_not_affect_the_others(model: PreTrainedModel, strategy: Strategy) -> None:
    engine = engine_of(model, strategy)
    poisoned = [5, POISON, 6, 7]
    completions = [
        CompletionTokens(poisoned, [0, 1, 2]),
        OTHERS[0],
        CompletionTokens(poisoned, [0, 1]),  # the NaN token is predicted, not fed
        CompletionTokens(poisoned, [3]),
        OTHERS[1],
    ]
    before = measure(engine, *completions)
    embedding_of(model).weight[POISON] = math.nan
    results = measure(engine, *completions)
    bad = Reason.NON_FINITE_LOGITS
    assert reasons(before) == [None] * 5
    assert reasons(results) == [bad, None, None, bad, None]
    assert_same([results[i] for i in (1, 2, 4)], *[before[i] for i in (1, 2, 4)])
    message = "the policy's logits are not finite"
    assert results[0] == results[3] == Unmeasurable(bad, message)


@FORWARDS
@torch.no_grad()
def test_nan_in_the_prompt_fails_the_whole_group(model: PreTrainedModel, strategy: Strategy) -> None:
    engine = engine_of(model, strategy)
    expected = measure(engine, *OTHERS)
    embedding_of(model).weight[POISON] = math.nan
    results = measure(engine, *OTHERS, prompt_ids=[*PROMPT[:-1], POISON])
    assert reasons(results) == [Reason.NON_FINITE_LOGITS] * 2
    assert measure(engine, *OTHERS) == expected  # the next group is not affected


@FORWARDS
@pytest.mark.parametrize("part", ["trunk", "head"])
def test_an_exception_fails_the_group_but_not_the_engine(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, strategy: Strategy, part: str
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise ArithmeticError("no more")

    engine = engine_of(model, strategy, ModuleHead(model, NUM_ROWS))
    expected = measure(engine, *OTHERS)
    too_long = CompletionTokens(random_ids(90, seed=4), [80])
    with monkeypatch.context() as patch:
        patch.setattr(trunk_of(model) if part == "trunk" else head_of(model), "forward", fail)
        results = measure(engine, OTHERS[0], too_long, OTHERS[1])
    failed, no_room = Reason.ENGINE_FAILURE, Reason.SEQUENCE_TOO_LONG
    assert reasons(results) == [failed, no_room, failed]
    assert results[0] == Unmeasurable(failed, "ArithmeticError")
    assert measure(engine, *OTHERS) == expected


def test_an_unknown_id_fails_the_group(model: PreTrainedModel) -> None:
    engine = engine_of(model)
    expected = measure(engine, *OTHERS)
    results = measure(engine, OTHERS[0], CompletionTokens([NUM_ROWS, 5], [1]))
    assert reasons(results) == [Reason.ENGINE_FAILURE] * 2
    assert measure(engine, *OTHERS) == expected


# --- no needless work -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "position", "num_fed"),
    [
        # 20 of the prompt; completions are fed up to the token before the last scored one, 4 and 7 …
        (ExpandedForward, "predict", 20 + 7 + 7),  # padded to the longest
        (IndependentForward, "predict", 20 + 4 + 20 + 7),
        # … or with it.
        (ExpandedForward, "shifted", 20 + 8 + 8),
        (IndependentForward, "shifted", 20 + 5 + 20 + 8),
    ],
)
def test_only_needed_tokens_are_fed(
    model: PreTrainedModel, strategy: Strategy, position: str, num_fed: int
) -> None:
    fed: list[int] = []
    engine = engine_of(model, strategy)
    embedding_of(model).register_forward_pre_hook(lambda _module, args: fed.append(args[0].numel()))
    measure(engine, *OTHERS, position=position)
    assert sum(fed) == num_fed


def test_only_scored_tokens_reach_the_head(model: PreTrainedModel) -> None:
    class CountingHead(LinearHead):
        num_seen = 0

        def logit_chunks(self, hidden_T_H: torch.Tensor, num_rows: int) -> Iterator[torch.Tensor]:
            CountingHead.num_seen += hidden_T_H.shape[0]
            return super().logit_chunks(hidden_T_H, num_rows)

    measure(engine_of(model, head=CountingHead(head_of(model).weight)), *OTHERS)
    assert CountingHead.num_seen == 3  # tokens 0, 4 and 7


@pytest.mark.parametrize("num_too_long", [0, 1])
def test_no_pass_without_tokens_to_score(num_too_long: int) -> None:
    class NoForward:
        name = attention = "none"

        def hidden_states(self, *_args: Any) -> list[torch.Tensor]:
            pytest.fail("nothing is to be computed")

        def batch(self, *_args: Any) -> list[list[torch.Tensor]]:
            pytest.fail("nothing is to be computed")

    forward: Forward = NoForward()
    head = LinearHead(torch.ones(3, 2))
    engine = Engine(forward, head, max_sequence_tokens=LIMIT, num_tokenizer_tokens=3)
    too_long = CompletionTokens(random_ids(90), [80])
    assert reasons(measure(engine, *[too_long] * num_too_long)) == [Reason.SEQUENCE_TOO_LONG] * num_too_long
