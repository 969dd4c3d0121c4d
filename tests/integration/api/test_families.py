"""Scores of every architecture, from token ids and from text, whichever forward strategy the engine chooses.

Each family is compared with the full logits of a copy in fp64 (`models.Reference`).
"""

import asyncio
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from shopr1_client.wire import Reward, ScoreRequest, Status
from shopr1_rewards import Span, recipe
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, CompletionTokens, Origin, PromptKey, TokenGroup
from shopr1_service.engine import lm_head as head
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.scoring.recipe_book import RecipeBook
from shopr1_service.scoring.scorer import Scorer
from shopr1_service.settings import Settings
from tests.support.models import (
    FAMILIES,
    NUM_TOKENS,
    Reference,
    byte_fallback,
    byte_level,
    ids_of,
    model_of,
    policy_of,
    random_ids,
    rules,
    slow_overlapping,
    tiny_model,
    token_bytes,
)

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)

TOLERANCE = 1e-4
"""Nats, fp32 against fp64. A lost prompt, scale, bias or softcap changes the values by 0.01 or more."""


@pytest.fixture(autouse=True, scope="module")
def _several_chunks() -> Iterator[None]:
    """Heads here have about 400 rows: with small chunks there are several, and the last one is partial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_ROWS", 100)
        yield


@functools.cache
def policy(family: str) -> LoadedPolicy:
    return policy_of(model_of(family))


@functools.cache
def reference(family: str) -> Reference:
    return Reference(model_of(family))


@EVERY_FAMILY
def test_choice_of_head_and_forward(family: str) -> None:
    info = policy(family).info
    assert (info.head, info.forward) == (FAMILIES[family].head, FAMILIES[family].forward)


# --- token groups -----------------------------------------------------------------------------------

PROMPT = random_ids(21, seed=1)  # longer than windows, chunks and convolutions
COMPLETIONS = {
    "from the first token": CompletionTokens(random_ids(9, seed=2), [0, 1, 2]),
    "with gaps": CompletionTokens(random_ids(14, seed=3), [3, 5, 6, 11]),
    "the same again": CompletionTokens(random_ids(14, seed=3), [3, 5, 6, 11]),
    "the same ids, last token": CompletionTokens(random_ids(14, seed=3), [13]),
    "all tokens": CompletionTokens(random_ids(30, seed=5), range(30)),
}


def check(
    family: str,
    prompt_ids: Sequence[int],
    completions: Sequence[CompletionTokens],
    rules: SelfCertaintyRecipe,
    tolerance: float = TOLERANCE,
) -> None:
    """Compare every value of a group with the reference."""
    actual = policy(family).certainties([TokenGroup(PromptKey(prompt_ids), completions)], rules)[0]
    for certainty, completion in zip(actual, completions, strict=True):
        expected = reference(family).values(prompt_ids, completion.ids, completion.measured, rules)
        assert isinstance(certainty, Certainty), certainty
        assert certainty.values == pytest.approx(expected, rel=0, abs=tolerance)
        assert certainty.mean == pytest.approx(sum(expected) / len(expected), rel=0, abs=tolerance)


@EVERY_FAMILY
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, TOLERANCE),
        ({"divergence": "kl_p_u"}, TOLERANCE),
        ({"divergence": "eq3"}, TOLERANCE / 300),  # ÷ V, and V > 300
        ({"position": "shifted"}, TOLERANCE),
        ({"temperature": 0.6}, TOLERANCE / 0.6),
        ({"vocabulary": "tokenizer"}, TOLERANCE),
        (
            {
                "divergence": "kl_p_u",
                "position": "shifted",
                "temperature": 0.6,
                "vocabulary": "tokenizer",
            },
            TOLERANCE / 0.6,
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "default" if isinstance(value, dict) else "",
)
def test_values(family: str, options: dict[str, Any], tolerance: float) -> None:
    check(family, PROMPT, list(COMPLETIONS.values()), rules(**options), tolerance)


@EVERY_FAMILY
@pytest.mark.parametrize("num_prompt_tokens", [1, 8])
def test_short_prompts(family: str, num_prompt_tokens: int) -> None:
    # Shorter than a convolution (4); as long as a window or chunk (8).
    check(family, PROMPT[:num_prompt_tokens], list(COMPLETIONS.values()), rules())


@EVERY_FAMILY
def test_no_prompt(family: str) -> None:
    check(family, [], [CompletionTokens(random_ids(12, seed=6), [1, 2, 11])], rules())


@EVERY_FAMILY
def test_one_token_or_none_after_the_prompt(family: str) -> None:
    # Many models have separate code for a step of one token.
    ids = random_ids(2, seed=7)
    check(family, PROMPT, [CompletionTokens(ids, [0]), CompletionTokens(ids, [1])], rules())


@pytest.mark.parametrize(
    ("family", "num_head_rows"), [("llama", 389), ("llama_unpadded", 371), ("llama_narrow_head", 351)]
)
def test_vocabulary_sizes(family: str, num_head_rows: int) -> None:
    # The tokenizer has 371 tokens. Tokens beyond the head's rows have no logit.
    info = policy(family).info
    assert (info.num_head_rows, info.num_tokenizer_tokens) == (num_head_rows, NUM_TOKENS)
    completion = COMPLETIONS["with gaps"]
    of_head, of_tokenizer = (
        policy(family).certainties(
            [TokenGroup(PromptKey(PROMPT), [completion])], rules(vocabulary=vocabulary)
        )[0]
        for vocabulary in ("head", "tokenizer")
    )
    assert (of_head == of_tokenizer) == (num_head_rows <= NUM_TOKENS)


# --- from text to the answer ------------------------------------------------------------------------

SETTINGS = Settings()
PAGE = "<button name='buy'>立即购买 – 3 €</button>"
BEFORE = '{"rationale": "'
AFTER = '", "action": {"type": "terminate"}}'
RATIONALES = {
    "ascii": "The price is lower.",
    "one character": "茶",
    "several bytes": "便宜的茶 für 3 €, お茶 🍵🛒",
    "quotes": r"the \"green\" one \\ or \/ \t that",
    "escapes": r"caf\u00e9 \ud83c\udf75 \u8336",
    "both": r"é\u00e9é🍵\ud83c\udf75🍵\"茶",
    "a special token": "then <|im_end|> and on",
    "white space": "  two  spaces ",
}


def score(policy: LoadedPolicy, book: RecipeBook, prompt: Any, completions: Sequence[Any]) -> list[Reward]:
    group = {"prompt": prompt, "ground_truth": {"type": "terminate"}, "completions": completions}
    request = ScoreRequest.model_validate({"groups": [group], "include": ["tokens", "token_ids"]})
    scorer = Scorer(LocalEngine(policy, SETTINGS, Metrics()), book, SETTINGS, Metrics())
    try:
        return asyncio.run(scorer.score(request, Origin("id"))).groups[0].rewards
    finally:
        scorer.close()


@functools.cache
def spelling_of(tokenizer: PreTrainedTokenizerFast) -> dict[bytes, int]:
    """The id of the token of each single byte."""
    # The first token of a text may lose a space: token 3 comes before the one that is spelt.
    return {token_bytes(tokenizer, [3, i])[1]: i for i in reversed(range(3, 259))}


def one_per_byte(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids that decode to the text although no tokenizer gives them for it."""
    spelling = spelling_of(tokenizer)
    return [spelling[bytes([byte])] for byte in text.encode()]


def forms(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[Any, list[int]]]:
    """Ways to send a completion, each with the token ids that it means."""
    ids = ids_of(tokenizer, text)
    by_byte = one_per_byte(tokenizer, text)
    return [
        (text, ids),
        ({"text": f"\n{text}"}, ids_of(tokenizer, f"\n{text}")),
        ({"token_ids": ids}, ids),
        ({"token_ids": [*ids, tokenizer.eos_token_id]}, [*ids, tokenizer.eos_token_id]),
        ({"token_ids": by_byte}, by_byte),
    ]


def check_answers(
    policy: LoadedPolicy, reference: Reference, tokenizer: PreTrainedTokenizerFast, rationales: Sequence[str]
) -> None:
    """Score all forms of answers with these rationales, as one group, and check each."""
    texts = [f"{BEFORE}{rationale}{AFTER}" for rationale in rationales]
    sent = [(text, *form) for text in texts for form in forms(tokenizer, text)]
    rewards = score(policy, RecipeBook("shop_r1"), PAGE, [completion for _, completion, _ in sent])
    for (text, _, ids), reward in zip(sent, rewards, strict=True):
        tokens = token_bytes(tokenizer, ids)
        decoded = b"".join(tokens).decode()
        start = decoded.index(text) + len(BEFORE)
        measured = slow_overlapping(tokens, decoded, Span(start, start + len(text) - len(BEFORE + AFTER)))
        values = reference.values(ids_of(tokenizer, PAGE), ids, measured, rules())
        check_reward(reward, ids, measured, values)


def check_reward(reward: Reward, ids: Sequence[int], measured: Sequence[int], values: list[float]) -> None:
    details, mean = reward.details, sum(values) / len(values)
    assert (reward.status, details.format_error) == (Status.SCORED, None)
    assert details.completion_token_ids == ids
    assert details.tokens is not None
    assert [(t.index, t.token_id) for t in details.tokens] == [(i, ids[i]) for i in measured]
    assert [t.value for t in details.tokens] == pytest.approx(values, rel=0, abs=TOLERANCE)
    assert details.num_rationale_tokens == len(measured)
    assert details.self_certainty_nats == pytest.approx(mean, rel=0, abs=TOLERANCE)
    assert reward.components["self_certainty"] == pytest.approx(0.005 * mean, rel=0, abs=TOLERANCE)
    assert reward.reward == pytest.approx(0.5 + 0.3 + 0.005 * mean, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama_narrow_head"])
def test_answers(family: str) -> None:
    rationales = [RATIONALES["several bytes"], RATIONALES["both"]]
    check_answers(policy(family), reference(family), tokenizer_of(byte_level), rationales)


@functools.cache
def tokenizer_of(make: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make()


@functools.cache
def tokenised(make: Callable[[], PreTrainedTokenizerFast]) -> tuple[LoadedPolicy, Reference]:
    model = tiny_model()
    return policy_of(model, tokenizer_of(make)), Reference(model)


TOKENIZERS = pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=["byte_level", "byte_fallback"])


@TOKENIZERS
@pytest.mark.parametrize("rationale", RATIONALES.values(), ids=RATIONALES.keys())
def test_answers_of_all_kinds(make: Callable[[], PreTrainedTokenizerFast], rationale: str) -> None:
    check_answers(*tokenised(make), tokenizer_of(make), [rationale])


# A literal U+FFFD looks like part of a character: test_tokenizer.py tests it.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")


@TOKENIZERS
@settings(max_examples=25)
@given(st.text(characters, min_size=1, max_size=20), st.booleans())
def test_answers_of_any_text(
    make: Callable[[], PreTrainedTokenizerFast], rationale: str, is_escaped: bool
) -> None:
    written = json.dumps(rationale, ensure_ascii=is_escaped)[1:-1]
    check_answers(*tokenised(make), tokenizer_of(make), [written])


def test_messages_are_the_templated_text() -> None:
    chat = [{"role": "system", "content": "Shop."}, {"role": "user", "content": "茶?"}]
    templated = (
        "<|im_start|>system\nShop.<|im_end|>\n<|im_start|>user\n茶?<|im_end|>\n<|im_start|>assistant\n"
    )
    completion = f"{BEFORE}便宜{AFTER}"
    ids = ids_of(byte_level(), templated)
    book = RecipeBook("shop_r1")
    as_chat, as_text, as_ids = (
        score(policy("llama"), book, prompt, [completion])[0]
        for prompt in (chat, templated, {"token_ids": ids})
    )
    assert as_chat == as_text == as_ids
    assert as_chat.status is Status.SCORED


def test_recipe_decides_which_tokens_are_scored(tmp_path: Path) -> None:
    options = {
        "divergence": "kl_p_u",
        "span": "completion",
        "position": "shifted",
        "temperature": 0.6,
        "vocabulary": "tokenizer",
    }
    changed = "\n".join(f"{key} = {json.dumps(value)}" for key, value in options.items())
    toml = (
        'name = "mine"\nformat.reward = 0.5\n[action_space]\ndars = 0\ntypes.terminate.reward = 0.3\n'
        f"[self_certainty]\nalpha = 0.005\n{changed}\n"
    )
    path = tmp_path / "mine.toml"
    path.write_text(toml, "utf-8")
    text = f"{BEFORE}便宜{AFTER}"
    # White space around the answer and end tokens after it belong to no span.
    ids = ids_of(byte_level(), f"{text}\n<|im_end|>")
    [reward] = score(policy("llama"), RecipeBook(str(path)), PAGE, [{"token_ids": ids}])
    measured = range(len(ids) - 2)
    values = reference("llama").values(
        ids_of(byte_level(), PAGE), ids, measured, recipe.load_recipe(str(path)).self_certainty
    )
    check_reward(reward, ids, measured, values)
