"""Preparing a request: every error at once, limits, and which tokens are needed."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shopr1_client.errors import InvalidRequestError, TooLargeError
from shopr1_client.wire import Limits, ScoreRequest
from shopr1_rewards import load_recipe
from shopr1_service.concurrency import in_pool
from shopr1_service.core import CodecError, PreparedGroup, Tokens
from shopr1_service.policy.fake import CharacterCodec
from shopr1_service.scoring.prepare import prepare
from shopr1_service.settings import Settings
from tests.support.http import answer, group

RECIPE = load_recipe("shop_r1")


def prepared(*groups: Any, wants_ids: bool = False, **limits: Any) -> list[PreparedGroup]:
    request = ScoreRequest.model_validate({"groups": groups})
    changed: Limits = Settings().limits.model_copy(update=limits)
    return prepare(request, RECIPE, CharacterCodec(), changed, wants_ids=wants_ids)


def test_the_rationales_tokens_are_measured() -> None:
    [only] = prepared(group(answer(rationale="abcd"), "not JSON", prompt="page"))
    first, second = only.rollouts
    assert "".join(map(chr, only.prompt_ids)) == "page"
    assert first.tokens.text == answer(rationale="abcd")
    assert "".join(first.tokens.text[i] for i in first.measured) == "abcd"
    assert (second.tokens.ids, second.measured) == ((), ())
    [completion] = only.token_group().completions
    assert (completion.ids, completion.measured) == (first.tokens.ids, first.measured)
    assert only.token_group().prompt_ids == only.prompt_ids


def test_a_prompt_is_encoded_only_if_it_is_needed() -> None:
    assert prepared(group("not JSON"))[0].prompt_ids == ()
    [only] = prepared(group("not JSON"), wants_ids=True)
    assert "".join(map(chr, only.prompt_ids)) == "page"
    assert only.rollouts[0].tokens.text == "not JSON"


def test_equal_texts_share_a_rollout_and_count_each() -> None:
    [only] = prepared(group(answer(), {"text": answer()}, answer(rationale="other"), "not JSON", answer()))
    first, second, other, broken, last = only.rollouts
    assert first is second is last
    assert first is not other
    assert broken.judgement.failure is not None
    assert len(only.token_group().completions) == 4
    num_tokens = 3 * len(answer()) + len(answer(rationale="other")) + len("page")
    assert prepared(group(*[answer()] * 3, answer(rationale="other")), max_request_tokens=num_tokens)
    with pytest.raises(TooLargeError, match="max_request_tokens"):
        prepared(group(*[answer()] * 3, answer(rationale="other")), max_request_tokens=num_tokens - 1)


def test_all_errors_of_a_request_are_named() -> None:
    bad_ids = {"token_ids": [1, 0x110000]}
    with pytest.raises(InvalidRequestError) as caught:
        prepared(group(answer(), truth={"type": 1}), group(bad_ids), group(answer(), prompt=bad_ids))
    locations = [error["location"] for error in caught.value.errors]
    assert locations[1:] == ["groups[1].completions[0].token_ids[1]", "groups[2].prompt.token_ids[1]"]
    assert locations[0].startswith("groups[0].ground_truth")


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("max_groups", "2 groups, max_groups = 1"),
        ("max_completions_per_group", r"groups\[0\] has 2 completions, max_completions_per_group = 1"),
        ("max_request_tokens", "more than max_request_tokens = 1"),
        ("max_text_chars", r"groups\[0\]\.prompt: has 4 characters, max_text_chars = 1"),
    ],
)
def test_limits(limit: str, message: str) -> None:
    only: dict[str, Any] = {limit: 1}
    with pytest.raises(TooLargeError, match=message):
        prepared(group(answer(), answer()), group(answer()), **only)


LONG = "x" * 100
LONG_CHAT = [{"role": "u", "content": "x" * 33}] * 2  # a message counts 16 more


@pytest.mark.parametrize(
    ("too_long", "field"),
    [
        (group(answer(), prompt=LONG + "x"), "prompt"),
        (group(answer(), prompt=[*LONG_CHAT, {"role": "u", "content": ""}]), "prompt"),
        (group("", LONG + "x"), "completions[1]"),
        (group({"text": LONG + "x"}), "completions[0]"),
    ],
)
def test_a_text_that_is_too_long_is_named(too_long: Any, field: str) -> None:
    with pytest.raises(TooLargeError, match="characters, max_text_chars = 100") as caught:
        prepared(group(LONG), too_long, max_text_chars=100)
    assert [error["location"] for error in caught.value.errors] == [f"groups[1].{field}"]


@pytest.mark.parametrize("longest", [group(LONG, prompt=LONG), group({"text": LONG}, prompt=LONG_CHAT)])
def test_a_text_may_be_as_long_as_the_limit(longest: Any) -> None:
    prepared(longest, max_text_chars=100)


class NoCodec(CharacterCodec):
    """A codec that must not be used."""

    def decode(self, ids: Sequence[int]) -> Tokens:
        raise AssertionError

    def encode_text(self, text: str) -> Tokens:
        raise AssertionError


@pytest.mark.parametrize(
    "too_long",
    [
        [group({"token_ids": [1] * 5}, {"token_ids": [1] * 6})],
        [group({"token_ids": [1] * 5}, prompt={"token_ids": [1] * 6})],
        [group(answer()), group({"token_ids": [1] * 11})],
        [group(answer(rationale=LONG * 10))],
    ],
)
def test_nothing_is_done_for_a_request_beyond_the_limits(too_long: Any) -> None:
    limits = Settings().limits.model_copy(update={"max_request_tokens": 10, "max_text_chars": 1000})
    request = ScoreRequest.model_validate({"groups": too_long})
    with pytest.raises(TooLargeError):
        prepare(request, RECIPE, NoCodec(), limits, wants_ids=True)


def test_ids_that_cannot_be_decoded_are_named() -> None:
    class Refusing(CharacterCodec):
        def decode(self, ids: Sequence[int]) -> Tokens:
            raise CodecError("too many")

    request = ScoreRequest.model_validate({"groups": [group(answer(), {"token_ids": [1]})]})
    with pytest.raises(InvalidRequestError) as caught:
        prepare(request, RECIPE, Refusing(), Settings().limits, wants_ids=False)
    assert caught.value.errors == [{"location": "groups[0].completions[1].token_ids", "message": "too many"}]


@pytest.mark.anyio
async def test_preparing_ends_when_nobody_waits_for_it() -> None:
    started, cancelled, ended = threading.Event(), threading.Event(), threading.Event()
    texts: list[str] = []

    class Slow(CharacterCodec):
        def encode_text(self, text: str) -> Tokens:
            texts.append(text)
            started.set()
            assert cancelled.wait(60)
            return super().encode_text(text)

    request = ScoreRequest.model_validate({"groups": [group(*[answer()] * 9)]})

    def work() -> None:
        try:
            prepare(request, RECIPE, Slow(), Settings().limits, wants_ids=False)
        finally:
            ended.set()

    with ThreadPoolExecutor(1) as pool:
        task = asyncio.ensure_future(in_pool(pool, work))
        await asyncio.to_thread(started.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled.set()
        assert await asyncio.to_thread(ended.wait, 60)
    assert len(texts) == 1


# --- options of prompts, and warnings -----------------------------------------------------------------

CHAT = [{"role": "user", "content": "hi"}]
PREFILLED = [*CHAT, {"role": "assistant", "content": "Sure"}]


def prompt_of(prompted: PreparedGroup) -> str:
    return "".join(map(chr, prompted.prompt_ids))


def test_a_groups_options_replace_its_requests() -> None:
    arguments = {"a": 1, "b": 1}
    request = ScoreRequest.model_validate(
        {
            "groups": [
                group(answer(), prompt=CHAT, chat_template_kwargs={"b": 2}),
                group(answer(), prompt=CHAT),
                group(answer(), prompt="page", chat_template_kwargs={"b": 2}),
            ],
            "chat_template_kwargs": arguments,
        }
    )
    groups = prepare(request, RECIPE, CharacterCodec(), Settings().limits, wants_ids=False)
    assert [prompt_of(each) for each in groups] == [
        '{"a": 1, "b": 2}\nuser: hi\n',
        '{"a": 1, "b": 1}\nuser: hi\n',
        "page",
    ]


def test_an_assistants_last_message_needs_an_option() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        prepared(group(answer(), prompt=CHAT), group("not JSON", prompt=PREFILLED))
    [error] = caught.value.errors
    assert error["location"] == "groups[1].prompt"
    assert error["message"].startswith(
        "messages[1], the last one, is the assistant's: set continue_final_message"
    )
    [continued] = prepared(group(answer(), prompt=PREFILLED, continue_final_message=True))
    [closed] = prepared(group(answer(), prompt=PREFILLED, continue_final_message=False))
    assert prompt_of(continued) == "user: hi\nassistant: Sure"
    assert prompt_of(closed) == "user: hi\nassistant: Sure\n"


def test_only_a_special_token_at_the_end_makes_it_invalid() -> None:
    [only] = prepared(
        group(answer(), answer() + "<special>", answer() + "<special> <end>", answer() + "x", "x<special>")
    )
    ends = [rollout.unknown_end for rollout in only.rollouts]
    assert ends == [None, "<special>", None, None, None]
    failures = [rollout.judgement.failure for rollout in only.rollouts]
    assert failures[0] is None
    assert failures[1] is not None
    assert failures[1].error.value == "extra_text"
    assert failures[1].message == (
        "'<special>' after the object, which is not an end token of the policy (setting end_tokens)"
    )
    assert [(warning.code.value, warning.message) for warning in only.warnings] == [
        ("unknown_end_token", "1 of 5 completions are invalid only because they end with '<special>'")
    ]


# --- ids beyond the embedding -------------------------------------------------------------------------


class SmallCodec(CharacterCodec):
    """The policy has embeddings for ASCII only."""

    num_ids = 128


@pytest.mark.parametrize(
    ("bad", "location"),
    [
        (group(answer(rationale="é")), "groups[1].completions[0]"),
        (group("x", answer(rationale="é")), "groups[1].completions[1]"),
        (group(answer(), prompt="é"), "groups[1].prompt"),
        (group("x", prompt=[{"role": "user", "content": "é"}]), "groups[1].prompt"),
    ],
)
def test_texts_with_ids_beyond_the_embedding_are_refused(bad: Any, location: str) -> None:
    request = ScoreRequest.model_validate({"groups": [group(answer()), bad]})
    with pytest.raises(InvalidRequestError) as caught:
        prepare(request, RECIPE, SmallCodec(), Settings().limits, wants_ids=False)
    assert caught.value.errors == [
        {
            "location": location,
            "message": "contains 'é', token id 233, which is not below 128: "
            "the tokenizer has more tokens than the policy",
        }
    ]


def test_text_that_is_not_tokenised_is_not_refused() -> None:
    request = ScoreRequest.model_validate({"groups": [group("é", prompt="é")]})
    [only] = prepare(request, RECIPE, SmallCodec(), Settings().limits, wants_ids=False)
    assert only.prompt_ids == ()
