"""Splitting requests and putting answers together: every rollout once, in its place, within the limits."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_client import request_splitting as parts
from shopr1_client.errors import InvalidRequestError, PolicyVersionError, TransportError
from shopr1_client.request_splitting import Part, check, merge, ranked, relocated, split
from shopr1_client.wire import Group, Include, Limits, ScoreRequest, ScoreResponse, TokenIds

URLS = ["http://a", "http://b", "http://c"]
LIMITS = Limits(max_body_bytes=10**6, max_groups=5, max_completions_per_group=4, max_request_tokens=10**6)


def request_of(*groups: tuple[Any, list[Any]], **more: Any) -> ScoreRequest:
    return ScoreRequest(
        groups=[
            Group(id=f"g{i}", prompt=prompt, ground_truth={"type": "terminate"}, completions=completions)
            for i, (prompt, completions) in enumerate(groups)
        ],
        **more,
    )


def answer_to(part: Part, *, version: str = "0", digest: str = "d") -> ScoreResponse:
    """An answer whose messages name the completions that they are about."""
    groups = json.loads(part.body)["groups"]
    return ScoreResponse.model_validate(
        {
            "request_id": "r",
            "recipe": {"name": "shop_r1", "digest": digest},
            "policy": {"model": "m", "version": version, "number": 0},
            "groups": [
                {
                    "id": group["id"],
                    "policy_version": version,
                    "policy_number": 0,
                    "rewards": [reward_of(completion) for completion in group["completions"]],
                }
                for group in groups
            ],
        }
    )


def reward_of(completion: Any) -> dict[str, Any]:
    return {
        "reward": 0.0,
        "status": "scored",
        "reason": None,
        "message": json.dumps(completion),
        "components": dict.fromkeys(("format", "action_type", "attribute", "value", "self_certainty"), 0.0),
        "details": {
            "format_error": None,
            "format_message": None,
            "predicted_action": None,
            "unknown_action_type": False,
            "missing_attributes": [],
            "extra_keys": [],
            "similarity": {},
            "type_match": False,
            "exact_match": False,
            "self_certainty_nats": None,
            "num_rationale_tokens": 0,
        },
    }


COMPLETION = st.one_of(
    st.text(max_size=5), st.builds(TokenIds, token_ids=st.lists(st.integers(0, 99), max_size=4))
)
GROUPS = st.lists(
    st.tuples(st.sampled_from(["p", "q", "ü" * 9]), st.lists(COMPLETION, max_size=11)), max_size=9
)


@given(
    groups=GROUPS,
    num_urls=st.integers(1, 3),
    max_groups=st.integers(1, 50),
    max_completions=st.integers(1, 12),
    max_request_tokens=st.integers(1, 60),
    max_body_bytes=st.integers(1, 3000),
)
def test_every_rollout_once_and_in_its_place(
    groups: list[tuple[str, list[Any]]],
    num_urls: int,
    max_groups: int,
    max_completions: int,
    max_request_tokens: int,
    max_body_bytes: int,
) -> None:
    request = request_of(*groups, include=[Include.TOKENS])
    limits = Limits(
        max_body_bytes=max_body_bytes,
        max_groups=max_groups,
        max_completions_per_group=max_completions,
        max_request_tokens=max_request_tokens,
    )
    own = split(request, limits, URLS[:num_urls])
    for part in own:
        sent = ScoreRequest.model_validate_json(part.body)
        assert sent.include == [Include.TOKENS]
        assert len(sent.groups) <= min(max_groups, parts.MAX_PART_GROUPS)
        assert all(len(group.completions) <= max_completions for group in sent.groups)
        assert len(part.body) <= max_body_bytes or len(sent.groups) <= 1
    assert sum(part.num_rollouts for part in own) == sum(len(completions) for _, completions in groups)
    merged = merge(request, own, [check(part, answer_to(part)) for part in own])
    assert [score.id for score in merged.groups] == [group.id for group in request.groups]
    for score, group in zip(merged.groups, request.groups, strict=True):
        plain = json.loads(group.model_dump_json())["completions"]
        assert [json.loads(str(reward.message)) for reward in score.rewards] == plain


def test_tokens_of_a_part_are_bounded() -> None:
    groups = [(TokenIds(token_ids=[1] * 40), [TokenIds(token_ids=[2] * 10), "12345"])] * 5
    limits = LIMITS.model_copy(update={"max_request_tokens": 115})
    # 55 tokens each, a text counted by its bytes: two go together.
    assert [part.num_rollouts for part in split(request_of(*groups), limits, URLS[:1])] == [4, 4, 2]


def test_options_of_prompts_are_sent_with_null_arguments() -> None:
    request = request_of(("p", ["a"])).model_copy(update={"chat_template_kwargs": {"x": None}})
    options: dict[str, Any] = {
        "chat_template_kwargs": {"y": None, "z": {"deep": None}},
        "add_special_tokens": False,
    }
    groups = [group.model_copy(update=options) for group in request.groups]
    [part] = split(request.model_copy(update={"groups": groups}), LIMITS, URLS[:1])
    sent = ScoreRequest.model_validate_json(part.body)
    assert sent.given() == {"chat_template_kwargs": {"x": None}}
    assert sent.groups[0].given() == options


def test_arguments_of_a_template_count_as_tokens() -> None:
    group = (
        request_of(("p", ["a"])).groups[0].model_copy(update={"chat_template_kwargs": {"tools": "x" * 90}})
    )
    request = request_of().model_copy(update={"groups": [group] * 3})
    limits = LIMITS.model_copy(update={"max_request_tokens": 250})
    assert [part.num_rollouts for part in split(request, limits, URLS[:1])] == [2, 1]


def test_one_prompt_always_goes_to_one_server() -> None:
    groups = [(f"prompt {i % 7}", ["a"]) for i in range(70)]
    own = split(request_of(*groups), LIMITS, URLS)
    by_prompt: dict[str, set[str]] = {}
    for part in own:
        for group in json.loads(part.body)["groups"]:
            by_prompt.setdefault(group["prompt"], set()).add(part.urls[0])
    assert len(by_prompt) == 7
    assert all(len(urls) == 1 for urls in by_prompt.values())
    assert all(sorted(part.urls) == URLS for part in own)  # the others are there to fall back on


def test_servers_share_alike_and_keep_their_share() -> None:
    keys = [str(i).encode() for i in range(3000)]
    first = [ranked(URLS, key)[0] for key in keys]
    # Binomial(3000, 1/3): 5 standard deviations are 130.
    assert all(abs(first.count(url) - 1000) < 130 for url in URLS)
    without = [ranked(URLS[:2], key)[0] for key in keys]
    assert all(now == before for now, before in zip(without, first, strict=True) if before != URLS[2])
    assert ranked(list(reversed(URLS)), b"key") == ranked(URLS, b"key")


def test_nothing_to_score_is_still_asked() -> None:
    [part] = split(request_of(recipe="mine", policy_version="7"), LIMITS, URLS)
    assert json.loads(part.body) == {"groups": [], "recipe": "mine", "policy_version": "7", "include": []}


def test_half_surrogate_pairs_are_sent_as_escapes() -> None:
    [part] = split(request_of(("p", ["\ud83d"])), LIMITS, URLS)
    assert b"\\ud83d" in part.body


@pytest.mark.parametrize("num_missing", [1, 2])
def test_an_answer_with_a_reward_missing_is_none(num_missing: int) -> None:
    [part] = split(request_of(("p", ["a", "b", "c"])), LIMITS, URLS)
    answer = answer_to(part)
    short = answer.groups[0].model_copy(update={"rewards": answer.groups[0].rewards[num_missing:]})
    with pytest.raises(TransportError, match=rf"has \[{3 - num_missing}\] rewards"):
        check(part, answer.model_copy(update={"groups": [short]}))
    with pytest.raises(TransportError, match=r"has \[\] rewards"):
        check(part, answer.model_copy(update={"groups": []}))


@pytest.mark.parametrize("numbers", [(3, 4), (4, 3)])
def test_the_answer_has_the_newest_of_several_versions(numbers: tuple[int, int]) -> None:
    request = request_of(("p", ["a"]), ("q", ["b"]))
    own = split(request, LIMITS.model_copy(update={"max_groups": 1}), URLS[:1])
    answers = [answer_to(part, version=f"v{number}") for part, number in zip(own, numbers, strict=True)]
    answers = [
        answer.model_copy(update={"policy": answer.policy.model_copy(update={"number": number})})
        for answer, number in zip(answers, numbers, strict=True)
    ]
    merged = merge(request, own, answers)
    assert (merged.policy.version, merged.policy.number) == ("v4", 4)


def test_a_group_is_scored_by_one_version() -> None:
    request = request_of(("p", list("abcdef")), ("q", ["a"]))
    own = split(request, LIMITS, URLS[:1])
    assert len(own) == 1  # both pieces of the first, and the second: one request
    small = LIMITS.model_copy(update={"max_groups": 1})
    own = split(request, small, URLS[:1])
    answers = [answer_to(part, version=version) for part, version in zip(own, "112", strict=True)]
    merged = merge(request, own, answers)
    assert [score.policy_version for score in merged.groups] == ["1", "2"]
    by_adapter = answers[1].groups[0].model_copy(update={"adapter": "a"})
    mixed = [answers[0], answers[1].model_copy(update={"groups": [by_adapter]}), answers[2]]
    with pytest.raises(PolicyVersionError, match="the policy changed"):
        merge(request, own, mixed)
    answers[1] = answer_to(own[1], version="2")
    with pytest.raises(PolicyVersionError, match="the policy changed"):
        merge(request, own, answers)


def test_servers_with_different_recipes_are_refused() -> None:
    request = request_of(*[(f"prompt {i}", ["a"]) for i in range(20)])
    own = split(request, LIMITS, URLS)
    answers = [answer_to(part, digest=part.urls[0]) for part in own]
    with pytest.raises(TransportError, match="different recipes"):
        merge(request, own, answers)


def test_errors_name_places_in_the_whole_request() -> None:
    request = request_of(("p", ["a"]), ("p", list("abcdef")))
    own = split(request, LIMITS.model_copy(update={"max_groups": 2}), URLS[:1])
    assert [part.num_rollouts for part in own] == [5, 2]
    locations = ["groups[0].completions[1].text", "groups[0].ground_truth", "groups[7]", "recipe"]
    error = InvalidRequestError("bad", errors=[{"location": each, "message": "bad"} for each in locations])
    moved = [field["location"] for field in relocated(error, own[1]).errors]
    assert moved == ["groups[1].completions[5].text", "groups[1].ground_truth", "groups[7]", "recipe"]
