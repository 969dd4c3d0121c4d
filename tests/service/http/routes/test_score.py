"""Responses of `POST /score`, for a policy whose tokens are characters and whose numbers are known."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from shopr1_client.wire import Reason, ScoreResponse
from shopr1_rewards import load_recipe
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, TokenGroup, Unmeasurable, Version
from shopr1_service.policy.fake import FakePolicy
from tests.support.http import (
    CLICK,
    SEARCH,
    TERMINATE,
    answer,
    group,
    post,
    problem,
    rewards,
    running,
    score,
    write_recipe,
)

pytestmark = pytest.mark.anyio

HALF_PAIR = "\ud83d"


def ids_of(text: str) -> dict[str, list[int]]:
    return {"token_ids": [ord(char) for char in text]}


def terms(reward: Any) -> tuple[Any, ...]:
    return tuple(reward["components"].values())


# --- numbers ----------------------------------------------------------------------------------------


async def test_figure_1() -> None:
    async with running(FakePolicy(26.0)) as client:
        [reward] = await rewards(
            client, answer({"type": "click", "name": "refinements.customer_reviews"}), truth=CLICK
        )
    # 0.5 for the format, 0.3 for the type, 0.2 for a name, 0 for the wrong one, 0.005 · 26 = 0.13
    assert terms(reward) == (0.5, 0.3, 0.2, 0.0, 0.13)
    assert reward["reward"] == 1.13
    assert reward["status"] == "scored"


@pytest.mark.parametrize(
    ("action", "expected", "total"),
    [
        pytest.param(TERMINATE, (0.5, 0.3, 0.0, 0.0, 0.13), 0.93, id="terminate"),
        pytest.param(CLICK, (0.5, 0.3, 0.2, 1000.0, 0.13), 1001.13, id="click"),
        # presence 0.1 + 0.1, value 0.1 · 1 + 1000 · 1
        pytest.param(SEARCH, (0.5, 0.3, 0.2, 1000.1, 0.13), 1001.23, id="type_and_submit"),
    ],
)
async def test_maxima(action: dict[str, str], expected: tuple[float, ...], total: float) -> None:
    async with running(FakePolicy(26.0)) as client:
        [reward] = await rewards(client, answer(action), truth=action)
    assert terms(reward) == expected
    assert reward["reward"] == sum(expected) == pytest.approx(total, rel=1e-15)
    assert reward["details"]["exact_match"] is True


RAW = '{"rationale": "RATIONALE", "action": {"type": "terminate"}}'


@pytest.mark.parametrize("form", ["string", "text", "token_ids"])
@pytest.mark.parametrize(
    ("completion", "first", "num"),
    [
        pytest.param(RAW.replace("RATIONALE", "abcd"), 15, 4, id="plain"),
        pytest.param(RAW.replace("RATIONALE", "x"), 15, 1, id="one character"),
        pytest.param(RAW.replace("RATIONALE", r"a\"b"), 15, 4, id="escaped quote: two characters"),
        pytest.param(RAW.replace("RATIONALE", r"\u00e9"), 15, 6, id="escaped letter: six"),
        pytest.param(RAW.replace("RATIONALE", r"\ud83d\ude00"), 15, 12, id="escaped pair: twelve"),
        pytest.param(RAW.replace("RATIONALE", "😀"), 15, 1, id="raw emoji: one"),
        pytest.param(RAW.replace("RATIONALE", "漢字"), 15, 2, id="raw Han"),
        pytest.param("\n " + RAW.replace("RATIONALE", "abcd"), 17, 4, id="space in front moves it by two"),
        pytest.param(RAW.replace("RATIONALE", "abcd") + "<end> ", 15, 4, id="end token behind"),
        # {"action": {"type": "terminate"}, is 34 characters with its space, "rationale": " 14 more
        pytest.param(
            '{"action": {"type": "terminate"}, "rationale": "abcd"}', 48, 4, id="rationale behind the action"
        ),
    ],
)
async def test_nats_are_the_mean_over_the_rationale(completion: str, first: int, num: int, form: str) -> None:
    sent = {"string": completion, "text": {"text": completion}, "token_ids": ids_of(completion)}[form]
    async with running(FakePolicy(10.0, 0.5)) as client:
        [reward] = await rewards(client, sent)
    # Token i has 10 + i/2 nats. The mean over first … first + num − 1 is 10 + (first + (num − 1)/2)/2.
    nats = 10 + (first + (num - 1) / 2) / 2
    assert reward["details"]["self_certainty_nats"] == nats
    assert reward["details"]["num_rationale_tokens"] == num
    assert terms(reward) == (0.5, 0.3, 0.0, 0.0, 0.005 * nats)


async def test_an_empty_rationale_has_no_certainty() -> None:
    async with running() as client:
        [reward] = await rewards(client, answer(rationale=""))
    assert terms(reward) == (0.5, 0.3, 0.0, 0.0, 0.0)
    assert reward["reward"] == 0.8
    assert reward["details"]["self_certainty_nats"] is None
    assert reward["details"]["num_rationale_tokens"] == 0


async def test_the_span_may_be_the_completion(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ('span = "rationale"', 'span = "completion"'))
    completion = '{"rationale":"abcd","action":{"type":"terminate"}}'
    async with running(FakePolicy(10.0, 0.5), recipe=recipe) as client:
        [reward] = await rewards(client, completion + "<end>\n")
    # 50 characters 0 … 49, whose mean is 24.5: 10 + 24.5/2 = 22.25. The end token does not count.
    assert reward["details"]["self_certainty_nats"] == 22.25
    assert reward["details"]["num_rationale_tokens"] == 50


async def test_alpha_0_needs_no_policy(tmp_path: Path) -> None:
    calls: list[None] = []
    policy = FakePolicy(before_scoring=lambda: calls.append(None))
    async with running(policy, recipe=write_recipe(tmp_path, ("alpha = 0.005", "alpha = 0"))) as client:
        [reward] = await rewards(client, answer())
    assert terms(reward) == (0.5, 0.3, 0.0, 0.0, 0.0)
    assert reward["details"]["self_certainty_nats"] is None
    assert reward["details"]["num_rationale_tokens"] == 0
    assert not calls


# --- shape ------------------------------------------------------------------------------------------


def shape(value: Any) -> Any:
    """The keys of every object in an answer; the keys of a predicted action are the policy's own."""
    if not isinstance(value, dict):
        return None
    return {key: shape(member) for key, member in value.items() if key != "predicted_action"}


async def test_every_answer_has_the_same_keys() -> None:
    # "page" and 18 characters before the rationale's last are 22 tokens; with "abcdefgh" 26.
    policy = FakePolicy(max_sequence_tokens=24)
    too_long = answer(rationale="abcdefgh")
    async with running(policy) as client:
        answered = await rewards(
            client, answer(), "nonsense", too_long, answer({"type": "scroll"}), answer(CLICK)
        )
    errors = [reward["details"]["format_error"] for reward in answered]
    assert errors == [None, "invalid_json", None, None, None]
    assert [reward["status"] for reward in answered] == ["scored", "scored", "unscorable", "scored", "scored"]
    first, *others = map(shape, answered)
    assert first == {
        "reward": None,
        "status": None,
        "reason": None,
        "message": None,
        "components": dict.fromkeys(("format", "action_type", "attribute", "value", "self_certainty")),
        "details": {
            **dict.fromkeys(("format_error", "format_message", "unknown_action_type", "missing_attributes")),
            **dict.fromkeys(("extra_keys", "exact_match", "self_certainty_nats", "num_rationale_tokens")),
            **dict.fromkeys(("converted", "type_match", "tokens", "completion_token_ids")),
            "similarity": {"name": None, "text": None},
        },
    }
    assert all(other == first for other in others)
    assert all("predicted_action" in reward["details"] for reward in answered)


async def test_terms_sum_to_the_reward() -> None:
    actions = (TERMINATE, CLICK, SEARCH, {"type": "scroll"})
    completions = [answer(action, "why " * k) for k, action in enumerate(actions)]
    async with running(FakePolicy(3.7, 0.013)) as client:
        answered = [
            reward
            for truth in (TERMINATE, CLICK, SEARCH)
            for reward in await rewards(client, *completions, "nonsense", truth=truth)
        ]
    assert len(answered) == 15
    assert all(reward["reward"] == sum(terms(reward)) for reward in answered)
    assert len({reward["reward"] for reward in answered}) > 5


async def test_details_of_invalid_completions() -> None:
    completion = json.dumps(
        {"rationale": "r", "action": {"type": "click", "name": "", "x": 1}, "confidence": 0.9}
    )
    async with running() as client:
        [reward] = await rewards(client, completion, truth=CLICK)
        [unknown] = await rewards(client, answer({"type": "scroll", "by": "1"}), truth=CLICK)
        [broken] = await rewards(client, "{", truth=CLICK)
    details = reward["details"]
    assert details["predicted_action"] == {"type": "click", "name": ""}
    assert details["missing_attributes"] == ["name"]
    assert details["extra_keys"] == ["confidence", "action.x"]
    assert details["similarity"] == {"name": 0.0, "text": None}
    assert terms(reward) == (0.5, 0.3, 0.0, 0.0, 0.13)
    assert unknown["details"]["unknown_action_type"] is True
    assert unknown["details"]["similarity"] == {"name": None, "text": None}
    assert terms(unknown) == (0.5, 0.0, 0.0, 0.0, 0.13)
    assert broken["details"]["predicted_action"] is None
    assert broken["details"]["format_message"]
    assert terms(broken) == (0.0, 0.0, 0.0, 0.0, 0.0)


async def test_values_of_tokens_on_demand() -> None:
    async with running(FakePolicy(10.0, 0.5)) as client:
        answered = await score(client, group(answer(rationale="é!"), "nonsense"), include=["tokens"])
    measured, nonsense = answered["groups"][0]["rewards"]
    assert measured["details"]["tokens"] == [
        {"index": 15, "token_id": 0xE9, "value": 17.5},  # 10 + 15/2
        {"index": 16, "token_id": 0x21, "value": 18.0},
    ]
    assert nonsense["details"]["tokens"] is None
    assert measured["details"]["completion_token_ids"] is None
    assert answered["groups"][0]["prompt_token_ids"] is None


async def test_ids_on_demand() -> None:
    chat = [{"role": "user", "content": "hi"}]
    async with running() as client:
        answered = await score(
            client,
            group(answer(), "no", ids_of("né"), HALF_PAIR, prompt="é"),
            group("no", prompt=chat),
            group("no", prompt={"token_ids": [7, 8]}),
            group(prompt="none"),
            include=["token_ids"],
        )
    first, *others = answered["groups"]
    ids = [reward["details"]["completion_token_ids"] for reward in first["rewards"]]
    # Half a pair is no text that a tokenizer takes.
    assert ids == [[ord(char) for char in answer()], [110, 111], [110, 0xE9], []]
    assert first["prompt_token_ids"] == [0xE9]
    assert [other["prompt_token_ids"] for other in others] == [
        [ord(char) for char in "user: hi\n"],
        [7, 8],
        [ord(char) for char in "none"],
    ]
    assert all(reward["details"]["tokens"] is None for reward in first["rewards"])


async def test_recipe_policy_and_ids_are_named() -> None:
    async with running() as client:
        answered = await score(client, group(id="a"), group(id="a"), group(id=None), group(), group(id=""))
    assert [scored["id"] for scored in answered["groups"]] == ["a", "a", None, None, ""]
    assert answered["recipe"] == {"name": "shop_r1", "digest": load_recipe("shop_r1").digest}
    assert answered["policy"] == {"model": "fake", "version": "0", "number": 0, "adapter": None}


@pytest.mark.parametrize("text", ["s 7/é 漢", "\x00\n", "😀"])
async def test_any_text_is_an_id(text: str) -> None:
    async with running() as client:
        answered = await score(client, group(id=text))
    assert answered["groups"][0]["id"] == text


async def test_half_a_surrogate_pair_is_no_id() -> None:
    # It could not be echoed: an answer is UTF-8.
    async with running() as client:
        body = problem(await post(client, {"groups": [group(id=HALF_PAIR)]}), 422, "invalid_request")
    assert [error["location"] for error in body["errors"]] == ["groups[0].id"]


async def test_nothing_to_score() -> None:
    async with running() as client:
        assert (await score(client))["groups"] == []
        assert await rewards(client) == []


# --- unscorable -------------------------------------------------------------------------------------


async def test_a_rollout_that_is_too_long_has_no_reward_and_the_others_have() -> None:
    # The last character of "abcd" is number 18: a prompt of 2 makes 20 tokens, of 3 makes 21.
    async with running(FakePolicy(26.0, max_sequence_tokens=20)) as client:
        answered = await score(
            client,
            group(answer(), answer(rationale="a"), "nonsense", prompt="ppp"),
            group(answer(), prompt="pp"),
        )
    (too_long, short, nonsense), [fits] = (scored["rewards"] for scored in answered["groups"])
    assert too_long["reward"] is None
    assert (too_long["status"], too_long["reason"]) == ("unscorable", "sequence_too_long")
    assert too_long["message"] == "21 tokens are needed"
    assert terms(too_long) == (0.5, 0.3, 0.0, 0.0, None)
    assert too_long["details"]["self_certainty_nats"] is None
    assert too_long["details"]["num_rationale_tokens"] == 4
    assert [reward["reward"] for reward in (short, nonsense, fits)] == [0.93, 0.0, 0.93]
    assert {reward["status"] for reward in (short, nonsense, fits)} == {"scored"}
    assert all(reward["reason"] is reward["message"] is None for reward in (short, nonsense, fits))


class Failing(FakePolicy):
    """Cannot measure the first completion of a group."""

    def __init__(self, reason: Reason) -> None:
        super().__init__()
        self._failure = Unmeasurable(reason, "because")

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        return [[self._failure, *measured[1:]] for measured in super().certainties(groups, rules, version)]


@pytest.mark.parametrize("reason", Reason)
async def test_every_reason_arrives(reason: Reason) -> None:
    async with running(Failing(reason)) as client:
        # The completion without a rationale comes first: it must not shift the others' values.
        nothing, failed, measured = await rewards(client, answer(rationale=""), answer(), answer())
    assert (failed["reward"], failed["reason"], failed["message"]) == (None, reason.value, "because")
    assert (nothing["reward"], measured["reward"]) == (0.8, 0.93)


@pytest.mark.parametrize("weight", ["1e9", "-1e9"])
async def test_the_largest_weights_give_numbers(tmp_path: Path, weight: str) -> None:
    """JSON cannot say infinity; a reward that overflowed would be null and yet be called scored."""
    recipe = write_recipe(
        tmp_path, ("alpha = 0.005", f"alpha = {weight}"), ("dars = 1000.0", f"dars = {weight}")
    )
    async with running(FakePolicy(26.0), recipe=recipe) as client:
        [reward] = await rewards(client, answer(CLICK), truth=CLICK)
    # 0.5 + 0.3 + 0.2, and the weight once for the value and 26 times for the certainty
    assert reward["reward"] == pytest.approx(1 + 27 * float(weight), rel=1e-12)
    assert reward["status"] == "scored"


# --- valid requests --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "truth",
    [
        CLICK,
        json.dumps(CLICK),
        {**CLICK, "element_id": 7, "note": None},
        ' {"name": "add_to_cart.buy_now", "type": "click"}\n',
    ],
)
async def test_the_ground_truth_is_an_object_or_a_string(truth: Any) -> None:
    async with running() as client:
        [reward] = await rewards(client, answer(CLICK), truth=truth)
    assert reward["reward"] == 1001.13


async def test_a_truth_that_no_answer_could_earn_is_refused() -> None:
    # An empty name earned 0.8 where any other one earned 1.0.
    truth = {"type": "click", "name": ""}
    async with running() as client:
        response = await client.post("/score", json={"groups": [group(answer(truth), truth=truth)]})
    [error] = problem(response, 422, "invalid_request")["errors"]
    assert error["location"] == "groups[0].ground_truth.name"
    assert error["message"].startswith("'name' of a 'click' action is empty")


async def test_an_exact_answer_of_symbols_earns_the_maximum() -> None:
    truth = {"type": "type_and_submit", "name": "🎁", "text": "★★★★☆"}
    async with running() as client:
        [reward] = await rewards(client, answer(truth), truth=truth)
    assert terms(reward) == (0.5, 0.3, 0.2, 1000.1, 0.13)


async def test_a_lenient_recipe_says_what_it_converted(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        ('attribute_types = "string"', 'attribute_types = "scalar"'),
        ('action_types = "exact"', 'action_types = "casefold"'),
    )
    completion = answer({"type": "Click", "name": 5, "text": None})
    truth = {"type": "click", "name": "5"}
    async with running(recipe=recipe) as client:
        [reward] = await rewards(client, completion, truth=truth)
        [other] = await rewards(client, answer(CLICK), truth=truth)
    assert reward["reward"] == 1001.13
    details = reward["details"]
    assert details["predicted_action"] == truth
    assert details["converted"] == ["action.type", "action.name", "action.text"]
    assert (details["exact_match"], details["extra_keys"]) == (True, [])
    assert other["details"]["converted"] == []
    async with running() as client:
        [strict] = await rewards(client, completion, truth=truth)
    assert (strict["reward"], strict["details"]["converted"]) == (0.63, [])


@pytest.mark.parametrize(
    ("prompt", "num_tokens"),
    [
        ("", 0),
        ("four", 4),
        ([], 0),
        ([{"role": "user", "content": "hi"}], 9),  # user: hi⏎
        ([{"role": "s", "content": "é"}, {"role": "u", "content": ""}], 9),  # s: é⏎u: ⏎
        ({"token_ids": []}, 0),
        ({"token_ids": [0, 1, 0x10FFFF]}, 3),
    ],
)
async def test_forms_of_a_prompt(prompt: Any, num_tokens: int) -> None:
    # The last character of "abcd" is number 18.
    for limit, status in ((num_tokens + 18, "scored"), (num_tokens + 17, "unscorable")):
        async with running(FakePolicy(max_sequence_tokens=limit)) as client:
            [reward] = await rewards(client, answer(), prompt=prompt)
        assert reward["status"] == status


@pytest.mark.parametrize("tail", ["", "<end>", "<end><end>", " \n<end>\t<end> ", "\r\n"])
@pytest.mark.parametrize("form", [str, ids_of])
async def test_the_end_of_turn_token_does_not_count(tail: str, form: Any) -> None:
    async with running() as client:
        [reward] = await rewards(client, form(answer() + tail))
    assert reward["reward"] == 0.93


@pytest.mark.parametrize(
    ("completion", "error"),
    [
        ("", "empty"),
        ("<end>", "empty"),
        ("{", "invalid_json"),
        ("[]", "not_an_object"),
        ("<end>" + answer(), "extra_text"),
        (answer() + "<end>.", "extra_text"),
        (answer() + answer(), "extra_text"),
        ('{"action": {"type": "terminate"}}', "missing_rationale"),
        ('{"rationale": "r"}', "missing_action"),
        ('{"rationale": "r", "action": {}}', "missing_action_type"),
        ('{"rationale": 1, "action": {"type": "terminate"}}', "wrong_type"),
        ('{"rationale": "r", "rationale": "r", "action": {"type": "terminate"}}', "duplicate_key"),
        ('{"rationale": "r", "action": {"type": "terminate"}, "p": NaN}', "non_finite_number"),
        ("[" * 65 + "]" * 65, "too_deep"),
        (HALF_PAIR, "invalid_json"),
        (answer(rationale=HALF_PAIR), "lone_surrogate"),
        (answer({"type": "click", "name": HALF_PAIR}), "lone_surrogate"),
        (answer(rationale="x").replace("x", r"\ud83d"), "lone_surrogate"),
        (ids_of(answer(rationale=HALF_PAIR)), "lone_surrogate"),
        ({"token_ids": []}, "empty"),
    ],
)
async def test_a_completion_in_another_form_is_scored_0_with_a_reason(completion: Any, error: str) -> None:
    async with running() as client:
        wrong, right = await rewards(client, completion, answer())
    assert (wrong["reward"], wrong["status"], wrong["reason"]) == (0.0, "scored", None)
    assert terms(wrong) == (0.0, 0.0, 0.0, 0.0, 0.0)
    assert wrong["details"]["format_error"] == error
    assert right["reward"] == 0.93


@pytest.mark.parametrize(
    "prompt",
    [
        HALF_PAIR,
        "page " + HALF_PAIR,
        [{"role": "user", "content": HALF_PAIR}],
        [{"role": HALF_PAIR, "content": "page"}],
    ],
)
@pytest.mark.parametrize("completions", [[], ["nonsense"], [answer()]])
async def test_half_a_surrogate_pair_is_no_prompt(prompt: Any, completions: Sequence[str]) -> None:
    async with running() as client:
        response = await post(client, {"groups": [group(), group(*completions, prompt=prompt)]})
    body = problem(response, 422, "invalid_request")
    assert [error["location"].startswith("groups[1].prompt") for error in body["errors"]] == [True]


# --- recipe and version -----------------------------------------------------------------------------


async def test_recipes_by_name(tmp_path: Path) -> None:
    mine = write_recipe(tmp_path, ("reward = 0.5", "reward = 0.25"))
    async with running(recipe=mine) as client:
        names = (None, "mine", "shop_r1")
        answered = {name: await score(client, group(answer()), recipe=name) for name in names}
    totals = {name: body["groups"][0]["rewards"][0]["reward"] for name, body in answered.items()}
    # 0.25 + 0.3 + 0.13
    assert totals == {None: pytest.approx(0.68), "mine": pytest.approx(0.68), "shop_r1": 0.93}
    assert {name: body["recipe"]["name"] for name, body in answered.items()} == {
        None: "mine",
        "mine": "mine",
        "shop_r1": "shop_r1",
    }
    assert answered["mine"]["recipe"]["digest"] == load_recipe(mine).digest


@pytest.mark.parametrize("name", ["nope", "", "shop_r1.toml", "/etc/passwd", HALF_PAIR])
async def test_unknown_recipe(name: str) -> None:
    async with running() as client:
        body = problem(await post(client, {"groups": [], "recipe": name}), 422, "invalid_request")
    assert [error["location"] for error in body["errors"]] == ["recipe"]
    assert "there are: shop_r1" in body["detail"]


@pytest.mark.parametrize("version", [None, "0"])
async def test_the_version_that_is_loaded(version: str | None) -> None:
    async with running() as client:
        answered = await score(client, group(answer()), policy_version=version)
    assert answered["groups"][0]["rewards"][0]["reward"] == 0.93


@pytest.mark.parametrize("version", ["1", "", "00", HALF_PAIR])
async def test_another_version(version: str) -> None:
    calls: list[None] = []
    async with running(FakePolicy(before_scoring=lambda: calls.append(None))) as client:
        response = await post(client, {"groups": [group(answer())], "policy_version": version})
        body = problem(response, 409, "policy_version")
    assert "'0' is loaded" in body["detail"]
    assert not calls


# --- order ------------------------------------------------------------------------------------------


def nats(reward: Any) -> float:
    return float(reward["details"]["self_certainty_nats"])


async def test_order_is_kept() -> None:
    # Base 0, step 1: a rationale of k characters has a mean of 15 + (k − 1)/2.
    groups = [
        group(answer(rationale="x" * (i + 1)), "nonsense", answer(rationale="x" * (i + 2)), id=str(i))
        for i in range(200)
    ]
    async with running(FakePolicy(0.0, 1.0)) as client:
        answered = await score(client, *groups)
    assert [scored["id"] for scored in answered["groups"]] == [str(i) for i in range(200)]
    for i, scored in enumerate(answered["groups"]):
        first, nonsense, last = scored["rewards"]
        assert (nats(first), nats(last)) == (15 + i / 2, 15 + (i + 1) / 2)
        assert nonsense["reward"] == 0.0


async def test_concurrent_requests_get_their_own_answers() -> None:
    async with running(FakePolicy(0.0, 1.0)) as client:

        async def ask(i: int) -> httpx.Response:
            groups = [group(answer(rationale="x" * (i + 1)), id=f"{i}.{j}") for j in range(3)]
            return await post(client, {"groups": groups}, **{"X-Request-ID": f"request-{i}"})

        responses = await asyncio.gather(*map(ask, range(40)))
    for i, response in enumerate(responses):
        body = response.json()
        assert body["request_id"] == response.headers["X-Request-ID"] == f"request-{i}"
        assert [scored["id"] for scored in body["groups"]] == [f"{i}.{j}" for j in range(3)]
        assert [nats(scored["rewards"][0]) for scored in body["groups"]] == [15 + i / 2] * 3


async def test_answers_match_the_wire_models() -> None:
    async with running() as client:
        response = await post(client, {"groups": [group(answer(), "nonsense", id="a")]})
    assert response.headers["Content-Type"] == "application/json"
    model = ScoreResponse.model_validate_json(response.content)
    assert model.model_dump(mode="json") == response.json()
