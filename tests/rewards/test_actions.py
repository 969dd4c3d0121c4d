from typing import Any

import pytest

from shopr1_rewards import Action, FormatError, PredictedAction, parse_strict, read_prediction
from shopr1_rewards.format_error import FormatFailure
from shopr1_rewards.recipe import FormatRecipe, OnFlaw
from tests.support.completions import SHOP_R1, accepted, envelope_of, refused

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
    with pytest.raises(AttributeError):
        prediction.is_known_type = False  # type: ignore[misc]
    with pytest.raises(AttributeError):
        prediction.action.type = "click"  # type: ignore[misc]


# --- lenient recipes --------------------------------------------------------------------------------

SCALARS = FormatRecipe.model_validate({"reward": 0.5, "attribute_types": "scalar"})
ANY_CASE = FormatRecipe.model_validate({"reward": 0.5, "action_types": "casefold"})


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("5", "5"),
        ("5.0", "5.0"),  # as written: 5 and 5.0 have other tokens
        ("-1.50E+3", "-1.50E+3"),
        ("1" * 5000, "1" * 5000),
        ("1e999", "1e999"),
        ("true", "true"),
        ("false", "false"),
        ('"5"', "5"),
    ],
)
def test_scalars_are_their_text(written: str, text: str) -> None:
    raw = f'{{"rationale": "r", "action": {{"type": "type_and_submit", "name": "q", "text": {written}}}}}'
    prediction = read_prediction(accepted(parse_strict(raw)), SPACE, SCALARS)
    assert isinstance(prediction, PredictedAction)
    assert prediction.action == Action("type_and_submit", {"name": "q", "text": text})
    assert prediction.converted == (() if written.startswith('"') else ("action.text",))


def test_null_is_as_if_the_key_were_left_out() -> None:
    # OPeRA's rows have every key, with null where a type has no such attribute.
    prediction = read({"type": "click", "name": "buy", "text": None, "click_type": "x"}, SCALARS)
    assert prediction == PredictedAction(
        Action("click", {"name": "buy"}), True, (), ("action.click_type",), ("action.text",)
    )
    missing = read({"type": "click", "name": None}, SCALARS)
    assert missing == PredictedAction(Action("click", {}), True, ("name",), (), ("action.name",))


@pytest.mark.parametrize("value", [[], ["a"], {}, {"a": 1}])
def test_lists_and_objects_are_no_text(value: Any) -> None:
    assert refuse({"type": "click", "name": value}, SCALARS).error is FormatError.WRONG_TYPE


def test_scalars_of_an_unknown_type_are_reported() -> None:
    prediction = read({"type": "scroll", "by": 5, "to": None, "at": []}, SCALARS)
    assert prediction.action == Action("scroll", {"by": "5"})
    assert prediction.extra_keys == ("action.at",)
    assert prediction.converted == ("action.by", "action.to")


@pytest.mark.parametrize("written", ["Click", "CLICK", "cLiCk"])
def test_type_in_other_case(written: str) -> None:
    prediction = read({"type": written, "name": "buy"}, ANY_CASE)
    assert prediction.action == Action("click", {"name": "buy"})
    assert prediction.is_known_type
    assert prediction.converted == ("action.type",)
    assert not read({"type": written, "name": "buy"}).is_known_type


@pytest.mark.parametrize("written", ["click ", "clicks", "", "scroll"])
def test_unknown_type_stays_unknown(written: str) -> None:
    prediction = read({"type": written}, ANY_CASE)
    assert (prediction.action.type, prediction.is_known_type) == (written, False)
    assert prediction.converted == ()


def test_each_option_is_its_own() -> None:
    assert refuse({"type": "click", "name": 5}, ANY_CASE).error is FormatError.WRONG_TYPE
    assert not read({"type": "Click"}, SCALARS).is_known_type


def test_a_strict_recipe_converts_nothing() -> None:
    assert read({"type": "click", "name": "a", "text": None, "x": 5}).converted == ()
