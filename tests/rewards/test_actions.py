import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from shopr1_rewards import (
    Action,
    FormatError,
    GroundTruthError,
    PredictedAction,
    read_ground_truth,
    read_prediction,
)
from shopr1_rewards.format_error import FormatFailure
from shopr1_rewards.recipe import FormatRecipe, OnFlaw
from tests.support.completions import SHOP_R1, answer, envelope_of, refused

SPACE = SHOP_R1.action_space
LENIENT = SHOP_R1.format


def strict_about(*flaws: str) -> FormatRecipe:
    return FormatRecipe.model_validate({"reward": 0.5, **dict.fromkeys(flaws, OnFlaw.REJECT)})


def read(action: dict[str, Any], rules: FormatRecipe = LENIENT, **extra: Any) -> PredictedAction:
    prediction = read_prediction(envelope_of(action, **extra), SPACE, rules)
    assert isinstance(prediction, PredictedAction), prediction
    return prediction


def refuse(action: dict[str, Any], rules: FormatRecipe = LENIENT, **extra: Any) -> FormatFailure:
    return refused(read_prediction(envelope_of(action, **extra), SPACE, rules))


# --- the policy's action ----------------------------------------------------------------------------

TYPE_AND_SUBMIT = {"type": "type_and_submit", "name": "search", "text": "tea"}


@pytest.mark.parametrize(
    "action",
    [{"type": "terminate"}, {"type": "click", "name": "buy_now"}, TYPE_AND_SUBMIT],
    ids=lambda action: str(action["type"]),
)
def test_flawless_action(action: dict[str, str]) -> None:
    attributes = {key: value for key, value in action.items() if key != "type"}
    expected = PredictedAction(Action(action["type"], attributes), True, (), ())
    rules = strict_about("unknown_action_type", "missing_attribute", "extra_key")
    assert read(action) == read(action, rules) == expected
    assert expected.action.to_dict() == action


@pytest.mark.parametrize(
    ("action", "missing"),
    [
        ({"type": "click"}, ("name",)),
        ({"type": "click", "name": ""}, ("name",)),
        ({"type": "click", "Name": "buy_now"}, ("name",)),
        ({"type": "type_and_submit", "name": "search"}, ("text",)),
        ({"type": "type_and_submit", "text": "tea"}, ("name",)),
        ({"type": "type_and_submit", "name": "", "text": ""}, ("name", "text")),
        ({"type": "click", "name": " "}, ()),  # white space is not nothing
        ({"type": "terminate"}, ()),
    ],
)
def test_missing_attributes_are_reported(action: dict[str, str], missing: tuple[str, ...]) -> None:
    assert read(action).missing_attributes == missing


@pytest.mark.parametrize(
    ("action", "extra", "keys"),
    [
        ({"type": "terminate", "name": "x"}, {}, ("action.name",)),
        ({"type": "terminate", "name": 5}, {}, ("action.name",)),
        ({"type": "click", "name": "a", "text": "b", "why": None}, {}, ("action.text", "action.why")),
        ({"type": "terminate"}, {"confidence": 0.9}, ("confidence",)),
        ({"type": "terminate", "x": {}}, {"a": 1, "b": [2]}, ("a", "b", "action.x")),
        # The text fields of an unknown type are its attributes.
        ({"type": "scroll", "direction": "down", "pixels": 5}, {}, ("action.pixels",)),
    ],
)
def test_extra_keys_are_reported(
    action: dict[str, Any], extra: dict[str, Any], keys: tuple[str, ...]
) -> None:
    prediction = read(action, **extra)
    assert prediction.extra_keys == keys
    assert not prediction.missing_attributes


@pytest.mark.parametrize("name", ["scroll", "", "Click", "click ", "input"])
def test_unknown_type_is_reported_with_its_text(name: str) -> None:
    prediction = read({"type": name, "direction": "down", "pixels": 5})
    assert prediction.action == Action(name, {"direction": "down"})
    assert not prediction.is_known_type


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (None, "null"),
        (True, "a boolean"),
        (5, "a number"),
        (0.5, "a number"),
        ([], "a list"),
        ({}, "an object"),
    ],
)
def test_attribute_of_another_json_type_is_invalid(value: Any, word: str) -> None:
    failure = refuse({"type": "type_and_submit", "name": "search", "text": value})
    assert failure == FormatFailure(FormatError.WRONG_TYPE, f"action.text must be a string, not {word}")


@pytest.mark.parametrize(
    ("flaw", "action", "extra", "expected"),
    [
        pytest.param(
            "unknown_action_type",
            {"type": "scroll"},
            {},
            FormatFailure(FormatError.UNKNOWN_ACTION_TYPE, "action.type 'scroll' is not in the action space"),
            id="unknown type",
        ),
        pytest.param(
            "missing_attribute",
            {"type": "click"},
            {},
            FormatFailure(FormatError.MISSING_ATTRIBUTE, "action.name is missing or empty"),
            id="missing attribute",
        ),
        pytest.param(
            "missing_attribute",
            {"type": "type_and_submit", "name": "search", "text": ""},
            {},
            FormatFailure(FormatError.MISSING_ATTRIBUTE, "action.text is missing or empty"),
            id="empty attribute",
        ),
        pytest.param(
            "extra_key",
            {"type": "terminate", "name": "x"},
            {},
            FormatFailure(FormatError.EXTRA_KEY, "key 'action.name' is not allowed"),
            id="extra key of the action",
        ),
        pytest.param(
            "extra_key",
            {"type": "terminate", "name": "x"},
            {"confidence": 0.9},
            FormatFailure(FormatError.EXTRA_KEY, "key 'confidence' is not allowed"),
            id="extra key of the answer",
        ),
    ],
)
def test_flaw_is_rejected_only_if_the_recipe_rejects_it(
    flaw: str, action: dict[str, str], extra: dict[str, Any], expected: FormatFailure
) -> None:
    others = {"unknown_action_type", "missing_attribute", "extra_key"} - {flaw}
    assert refuse(action, strict_about(flaw), **extra) == expected
    assert read(action, strict_about(*others), **extra).action.type == action["type"]


def test_empty_text_of_an_unknown_type_is_no_missing_attribute() -> None:
    # The action space knows of no attribute that this type must have.
    action = {"type": "scroll", "direction": ""}
    assert read(action).missing_attributes == ()
    assert not read(action, strict_about("missing_attribute")).is_known_type


def test_results_are_frozen() -> None:
    prediction = read({"type": "terminate"})
    with pytest.raises(FrozenInstanceError):
        prediction.is_known_type = False  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        prediction.action.type = "click"  # type: ignore[misc]


# --- the human's action -----------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True], ids=["object", "JSON string"])
@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        ({"type": "terminate"}, Action("terminate", {})),
        ({"type": "click", "name": "buy_now"}, Action("click", {"name": "buy_now"})),
        (TYPE_AND_SUBMIT, Action("type_and_submit", {"name": "search", "text": "tea"})),
        ({"text": "平安扣", "name": "", "type": "type_and_submit"},
         Action("type_and_submit", {"name": "", "text": "平安扣"})),
        # Data sets say more about an action; it is left alone.
        ({"type": "click", "name": "a", "click_type": None, "x": [1]}, Action("click", {"name": "a"})),
        ({"type": "terminate", "name": 5}, Action("terminate", {})),
    ],
    ids=["terminate", "click", "type_and_submit", "empty, any order", "more keys", "more keys, terminate"],
)  # fmt: skip
def test_ground_truth(truth: dict[str, Any], expected: Action, as_json: bool) -> None:
    assert read_ground_truth(json.dumps(truth) if as_json else truth, SPACE) == expected


def test_ground_truth_keeps_the_order_of_the_recipe() -> None:
    truth = read_ground_truth({"text": "b", "name": "a", "type": "type_and_submit"}, SPACE)
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
        read_ground_truth(json.dumps(truth) if as_json else truth, SPACE)
    assert (caught.value.field, str(caught.value)) == (field, message)


@pytest.mark.parametrize("key", ["type", "name"])
def test_ground_truth_with_half_a_surrogate_pair(key: str) -> None:
    truth = {"type": "click", "name": "a", key: "\ud800"}
    with pytest.raises(GroundTruthError, match="U\\+D800") as caught:
        read_ground_truth(truth, SPACE)
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
        read_ground_truth(text, SPACE)
    assert str(caught.value).startswith(message)
    assert caught.value.field is None


def test_ground_truth_may_have_white_space_around_it() -> None:
    assert read_ground_truth(' \n{"type": "terminate"}\t', SPACE) == Action("terminate", {})


def test_an_answer_is_no_ground_truth() -> None:
    with pytest.raises(GroundTruthError, match="'type' is missing"):
        read_ground_truth(answer({"type": "terminate"}), SPACE)
