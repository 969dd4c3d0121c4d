"""Preparing a request: every error at once, limits, and which tokens are needed."""

from typing import Any

import pytest

from shopr1_client.errors import InvalidRequestError, TooLargeError
from shopr1_client.wire import Limits, ScoreRequest
from shopr1_rewards import load_recipe
from shopr1_service.core import PreparedGroup
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
    ],
)
def test_limits(limit: str, message: str) -> None:
    only: dict[str, Any] = {limit: 1}
    with pytest.raises(TooLargeError, match=message):
        prepared(group(answer(), answer()), group(answer()), **only)
