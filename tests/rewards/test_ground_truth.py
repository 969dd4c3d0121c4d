import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_rewards import (
    Action,
    Component,
    GroundTruthError,
    Recipe,
    Tokenizer,
    judge,
    read_ground_truth,
)
from shopr1_rewards.recipe import ActionTypes, AttributeTypes, OnFlaw, Reading, Threshold, Which
from tests.support.completions import SHOP_R1, answer

TYPE_AND_SUBMIT = {"type": "type_and_submit", "name": "search", "text": "tea"}


@pytest.mark.parametrize("as_json", [False, True], ids=["object", "JSON string"])
@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        ({"type": "terminate"}, Action("terminate", {})),
        ({"type": "click", "name": "buy_now"}, Action("click", {"name": "buy_now"})),
        (TYPE_AND_SUBMIT, Action("type_and_submit", {"name": "search", "text": "tea"})),
        ({"text": "平安扣", "name": " ", "type": "type_and_submit"},
         Action("type_and_submit", {"name": " ", "text": "平安扣"})),
        # Data sets say more about an action; it is left alone.
        ({"type": "click", "name": "a", "click_type": None, "x": [1]}, Action("click", {"name": "a"})),
        ({"type": "terminate", "name": 5}, Action("terminate", {})),
    ],
    ids=["terminate", "click", "type_and_submit", "blank, any order", "more keys", "more keys, terminate"],
)  # fmt: skip
def test_ground_truth(truth: dict[str, Any], expected: Action, as_json: bool) -> None:
    assert read_ground_truth(json.dumps(truth) if as_json else truth, SHOP_R1) == expected


def test_ground_truth_keeps_the_order_of_the_recipe() -> None:
    truth = read_ground_truth({"text": "b", "name": "a", "type": "type_and_submit"}, SHOP_R1)
    assert list(truth.attributes) == ["name", "text"]


@pytest.mark.parametrize("as_json", [False, True], ids=["object", "JSON string"])
@pytest.mark.parametrize(
    ("truth", "field", "message"),
    [
        ({}, "type", "'type' is missing"),
        ({"name": "buy_now"}, "type", "'type' is missing"),
        ({"type": None}, "type", "'type' must be a string, not None"),
        ({"type": ["click"]}, "type", "'type' must be a string, not ['click']"),
        (
            {"type": "scroll"},
            "type",
            "type 'scroll' is not in the action space (terminate, click, type_and_submit)",
        ),
        ({"type": ""}, "type", "type '' is not in the action space (terminate, click, type_and_submit)"),
        ({"type": "click"}, "name", "'name' of a 'click' action is missing"),
        ({"type": "click", "name": None}, "name", "'name' of a 'click' action must be a string, not None"),
        ({"type": "click", "name": {}}, "name", "'name' of a 'click' action must be a string, not {}"),
        (
            {"type": "type_and_submit", "name": "a"},
            "text",
            "'text' of a 'type_and_submit' action is missing",
        ),
    ],
)
def test_ground_truth_that_is_no_action(
    truth: dict[str, Any], field: str, message: str, as_json: bool
) -> None:
    with pytest.raises(GroundTruthError) as caught:
        read_ground_truth(json.dumps(truth) if as_json else truth, SHOP_R1)
    assert (caught.value.field, str(caught.value)) == (field, message)


@pytest.mark.parametrize("key", ["type", "name"])
def test_ground_truth_with_half_a_surrogate_pair(key: str) -> None:
    truth = {"type": "click", "name": "a", key: "\ud800"}
    with pytest.raises(GroundTruthError, match="U\\+D800") as caught:
        read_ground_truth(truth, SHOP_R1)
    assert caught.value.field == key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON: Expecting value"),
        ("click", "not valid JSON: Expecting value"),
        ('{"type": "click", "name": "a"', "not valid JSON: Expecting ',' delimiter"),
        ('{"type": "terminate"} x', "not valid JSON: text after the JSON value, at character 21"),
        ('{"type": "click", "name": "a", "name": "b"}', "not valid JSON: key 'name' occurs twice"),
        ('{"type": "terminate", "x": NaN}', "not valid JSON: NaN is not a JSON number"),
        ('{"type": "terminate", "x": "\\ud800"}', "not valid JSON: half a surrogate pair"),
        ("[" * 10_000, "not valid JSON: nested deeper than 64 levels"),
        ('["terminate"]', "not a JSON object"),
        ('"terminate"', "not a JSON object"),
        ("null", "not a JSON object"),
    ],
)
def test_ground_truth_that_is_no_json_object(text: str, message: str) -> None:
    with pytest.raises(GroundTruthError) as caught:
        read_ground_truth(text, SHOP_R1)
    assert str(caught.value).startswith(message)
    assert caught.value.field is None


def test_ground_truth_may_have_white_space_around_it() -> None:
    assert read_ground_truth(' \n{"type": "terminate"}\t', SHOP_R1) == Action("terminate", {})


def test_an_answer_is_no_ground_truth() -> None:
    with pytest.raises(GroundTruthError, match="'type' is missing"):
        read_ground_truth(answer({"type": "terminate"}), SHOP_R1)


# --- labels that could not be earned ----------------------------------------------------------------


def recipe(**parts: Any) -> Recipe:
    """Shop-R1 with other choices, such as `format={"extra_key": "reject"}`."""
    content = SHOP_R1.model_dump()
    for name, part in parts.items():
        content[name] = {**content[name], **part} if isinstance(part, dict) else part
    return Recipe.model_validate(content)


def only(*components: Component, **format_rules: str) -> Recipe:
    return recipe(components=components, format=format_rules)


def why_refused(truth: dict[str, Any], rules: Recipe) -> str:
    with pytest.raises(GroundTruthError) as caught:
        read_ground_truth(truth, rules)
    assert caught.value.field is not None
    return f"{caught.value.field}: {caught.value}"


ROUGE_SCORE = recipe(similarity={"tokenizer": "rouge_score"})


@pytest.mark.parametrize(
    ("truth", "rules", "reason"),
    [
        # A name that is not empty earns 0.2, so an empty one would earn less than a wrong one.
        (
            {"type": "click", "name": ""},
            SHOP_R1,
            "name: 'name' of a 'click' action is empty: any other value could earn a reward, but not this "
            "one",
        ),
        (
            {**TYPE_AND_SUBMIT, "text": ""},
            SHOP_R1,
            "text: 'text' of a 'type_and_submit' action is empty: any other value could earn a reward, but "
            "not this one",
        ),
        (
            {**TYPE_AND_SUBMIT, "name": ""},
            only(Component.FORMAT, Component.ATTRIBUTE),
            "name: 'name' of a 'type_and_submit' action is empty: any other value could earn a reward, but "
            "not this one",
        ),
        (
            {**TYPE_AND_SUBMIT, "name": ""},
            only(Component.FORMAT, missing_attribute="reject"),
            "name: 'name' of a 'type_and_submit' action is empty, and the recipe rejects answers with an "
            "empty attribute",
        ),
        (
            {"type": "click", "name": "平安扣"},
            ROUGE_SCORE,
            "name: 'name' of a 'click' action has no token: '平安扣' earns nothing with tokenizer = "
            "'rouge_score'",
        ),
        (
            {**TYPE_AND_SUBMIT, "text": "+"},
            ROUGE_SCORE,
            "text: 'text' of a 'type_and_submit' action has no token: '+' earns nothing with tokenizer = "
            "'rouge_score'",
        ),
    ],
)
def test_label_that_could_not_be_earned_is_refused(truth: dict[str, Any], rules: Recipe, reason: str) -> None:
    assert why_refused(truth, rules) == reason


@pytest.mark.parametrize(
    ("truth", "rules"),
    [
        ({"type": "click", "name": ""}, only(Component.FORMAT, Component.ACTION_TYPE)),
        ({"type": "click", "name": "平安扣"}, only(Component.FORMAT, Component.ATTRIBUTE)),
        ({"type": "click", "name": "平安扣 ring"}, ROUGE_SCORE),
        ({"type": "click", "name": "★★★★☆"}, SHOP_R1),
        ({"type": "click", "name": " "}, SHOP_R1),
    ],
)
def test_label_that_can_be_earned_is_accepted(truth: dict[str, Any], rules: Recipe) -> None:
    assert read_ground_truth(truth, rules).to_dict() == truth


WEIGHTS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 1000.0])
THRESHOLDS = st.sampled_from([0.0, 0.75, 1 - 2**-53, 1.0])
VALUES = st.text(max_size=6) | st.sampled_from(
    ["", " ", "+", "🎁", "Nike™", "1½", "平安扣", '{"', "</think>", "<think>"]
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any choice that decides about text, with weights that are not negative."""
    reading = draw(st.sampled_from(Reading))
    threshold = draw(THRESHOLDS)
    inclusive = st.just(Threshold.INCLUSIVE)
    type_and_submit = {
        name: {"presence": draw(WEIGHTS), "value": draw(WEIGHTS | st.just("dars"))}
        for name in ("name", "text")
    }
    return Recipe.model_validate(
        {
            "name": "any",
            "components": draw(st.lists(st.sampled_from(Component), min_size=1, unique=True)),
            "format": {
                "reward": draw(WEIGHTS),
                "reading": reading,
                "which": draw(st.sampled_from(Which)) if reading is Reading.TOLERANT else Which.FIRST,
                "attribute_types": draw(st.sampled_from(AttributeTypes)),
                "action_types": draw(st.sampled_from(ActionTypes)),
                **{
                    flaw: draw(st.sampled_from(OnFlaw))
                    for flaw in ("unknown_action_type", "missing_attribute", "extra_key")
                },
            },
            "similarity": {
                "tokenizer": draw(st.sampled_from(Tokenizer)),
                "threshold": threshold,
                "threshold_is": draw(inclusive if threshold == 1 else st.sampled_from(Threshold)),
            },
            "self_certainty": {"alpha": 0},
            "action_space": {
                "dars": draw(WEIGHTS),
                "types": {
                    "stop": {"reward": draw(WEIGHTS)},
                    "submit": {"reward": draw(WEIGHTS), "attributes": type_and_submit},
                },
            },
        }
    )


def maximum(truth: Action, rules: Recipe) -> dict[str, float]:
    """All that there is to earn with this action."""
    action_type = rules.action_space.types[truth.type]
    presence = value = 0.0
    for attribute in action_type.attributes.values():
        presence += attribute.presence
        value += rules.action_space.dars if attribute.value == "dars" else attribute.value
    terms = {"format": rules.format.reward, "action_type": action_type.reward}
    terms |= {"attribute": presence, "value": value, "self_certainty": 0.0}
    return {name: terms[name] for name in rules.components}


@given(recipes(), st.sampled_from(["stop", "submit"]), VALUES, VALUES, st.text(max_size=5))
def test_every_accepted_truth_earns_the_maximum(
    rules: Recipe, kind: str, name: str, text: str, rationale: str
) -> None:
    try:
        truth = read_ground_truth({"type": kind, "name": name, "text": text}, rules)
    except GroundTruthError:
        return
    judgement = judge(answer(truth.to_dict(), rationale), truth, rules)
    assert judgement.earned == maximum(truth, rules)
    assert judgement.is_exact_match


@given(recipes(), VALUES, VALUES, VALUES, VALUES)
def test_no_answer_earns_more_than_an_accepted_truth(
    rules: Recipe, name: str, text: str, other_name: str, other_text: str
) -> None:
    try:
        truth = read_ground_truth({"type": "submit", "name": name, "text": text}, rules)
    except GroundTruthError:
        return
    other = judge(answer({"type": "submit", "name": other_name, "text": other_text}), truth, rules)
    best = maximum(truth, rules)
    assert all(earned <= best[component] for component, earned in other.earned.items())
