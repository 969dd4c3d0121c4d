import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_rewards import Action, FormatError, Judgement, Recipe, judge, measured_terms, parse_recipe, total
from shopr1_rewards.strict_json import Span
from tests.support.completions import (
    SHOP_R1,
    TERMINATE,
    answer,
    click,
    slow_f1,
    type_and_submit,
)


def recipe(**parts: dict[str, Any]) -> Recipe:
    """Shop-R1 with other choices, such as `format={"extra_key": "reject"}`."""
    content = SHOP_R1.model_dump()
    return Recipe.model_validate({**content, **{name: {**content[name], **parts[name]} for name in parts}})


def values(judgement: Judgement, self_certainty: float | None = 0.0) -> tuple[float | None, ...]:
    """Values of all components, with this weighted self-certainty."""
    return tuple(judgement.components({"self_certainty": self_certainty}).values())


def reward(judgement: Judgement, self_certainty: float | None = 0.0) -> float | None:
    return total(judgement.components({"self_certainty": self_certainty}))


def judged(predicted: Action, truth: Action, rules: Recipe = SHOP_R1) -> Judgement:
    return judge(answer(predicted.to_dict()), truth, rules)


# --- numbers of the paper ---------------------------------------------------------------------------


def test_figure_1() -> None:
    # 0.5 for the format, 0.3 for the type, 0.2 for a name, 0 for the wrong one; 0.005 · 26 = 0.13
    judgement = judged(click("refinements.customer_reviews"), click("add_to_cart.buy_now"))
    components = judgement.components(measured_terms(26.0, SHOP_R1))
    assert components == {
        "format": 0.5,
        "action_type": 0.3,
        "attribute": 0.2,
        "value": 0.0,
        "self_certainty": 0.13,
    }
    assert total(components) == 1.13


@pytest.mark.parametrize(
    ("action", "maximum"),
    [
        pytest.param(TERMINATE, 0.8, id="terminate: 0.5 + 0.3"),
        pytest.param(click("buy_now"), 1001.0, id="click: 0.5 + 0.3 + 0.2 + 1000"),
        pytest.param(
            type_and_submit("search", "green tea"),
            1001.1,
            id="type_and_submit: 0.5 + 0.3 + (0.1 + 0.1) + (0.1 + 1000)",
        ),
    ],
)
def test_maxima_without_self_certainty(action: Action, maximum: float) -> None:
    judgement = judged(action, action)
    assert judgement.is_exact_match
    assert reward(judgement) == maximum


@pytest.mark.parametrize(("threshold_is", "value"), [("exclusive", 0.0), ("inclusive", 750.0)])
def test_exactly_at_the_threshold(threshold_is: str, value: float) -> None:
    # nav bar search button / nav bar search input: 2 · 3 / (4 + 4) = 0.75
    rules = recipe(similarity={"threshold_is": threshold_is})
    judgement = judged(click("nav_bar.search_button"), click("nav_bar.search_input"), rules)
    assert judgement.similarity == {"name": 0.75}
    assert judgement.earned["value"] == value
    assert reward(judgement) == 1.0 + value


@pytest.mark.parametrize(
    ("predicted", "truth", "attribute", "value"),
    [
        # 2 · 2 / (2 + 3) = 0.8 > 0.75, times DARS; the name in full, times 0.1
        (type_and_submit("search", "disney gift"), type_and_submit("search", "disney gift card"), 0.2, 800.1),
        # The threshold holds for the name as well: search button / search input is 0.5.
        (
            type_and_submit("search_button", "tea"),
            type_and_submit("search_input", "tea"),
            0.2,
            1000.0,
        ),
        (type_and_submit("search", "tee conector"), type_and_submit("search", "tee connector"), 0.2, 0.1),
        (type_and_submit("search", ""), type_and_submit("search", "tea"), 0.1, 0.1),
        (type_and_submit("", "tea"), type_and_submit("search", "tea"), 0.1, 1000.0),
        (type_and_submit("", ""), type_and_submit("search", "tea"), 0.0, 0.0),
        (click(""), click("buy_now"), 0.0, 0.0),
        (Action("click", {}), click("buy_now"), 0.0, 0.0),
        # Nothing is like nothing: an empty truth can be matched, but not earn.
        (type_and_submit("search", ""), type_and_submit("search", ""), 0.1, 0.1),
        # Presence counts, not what it says.
        (click(" "), click("buy_now"), 0.2, 0.0),
    ],
)
def test_attribute_and_value(predicted: Action, truth: Action, attribute: float, value: float) -> None:
    judgement = judged(predicted, truth)
    assert values(judgement) == (0.5, 0.3, attribute, value, 0.0)


def test_attribute_left_out_is_compared_as_nothing() -> None:
    judgement = judged(Action("type_and_submit", {"text": "tea"}), type_and_submit("search", "tea"))
    assert judgement.similarity == {"name": 0.0, "text": 1.0}
    assert not judgement.is_exact_match


# --- gates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "truth"),
    [
        (click("buy_now"), TERMINATE),
        (TERMINATE, click("buy_now")),
        (type_and_submit("search", "tea"), click("search")),
        (click("search"), type_and_submit("search", "tea")),
        (Action("scroll", {"name": "buy_now"}), click("buy_now")),
        (Action("Click", {"name": "buy_now"}), click("buy_now")),
    ],
)
def test_wrong_type_earns_the_format_only(predicted: Action, truth: Action) -> None:
    judgement = judged(predicted, truth)
    assert values(judgement, 0.13) == (0.5, 0.0, 0.0, 0.0, 0.13)
    assert judgement.prediction is not None
    assert judgement.prediction.action == predicted
    assert (judgement.similarity, judgement.is_exact_match) == ({}, False)
    assert judgement.certainty_span is not None


INVALID: dict[str, tuple[str, FormatError, dict[str, Any]]] = {
    "empty": ("", FormatError.EMPTY, {}),
    "fence": (f"```json\n{answer({'type': 'terminate'})}\n```", FormatError.EXTRA_TEXT, {}),
    "attribute of another type": (answer({"type": "click", "name": 5}), FormatError.WRONG_TYPE, {}),
    "missing attribute, rejected": (
        answer({"type": "click"}),
        FormatError.MISSING_ATTRIBUTE,
        {"missing_attribute": "reject"},
    ),
    "unknown type, rejected": (
        answer({"type": "scroll"}),
        FormatError.UNKNOWN_ACTION_TYPE,
        {"unknown_action_type": "reject"},
    ),
    "extra key, rejected": (
        answer({"type": "terminate"}, confidence=1),
        FormatError.EXTRA_KEY,
        {"extra_key": "reject"},
    ),
    "chatter only, tolerant": ("Sure!", FormatError.NO_OBJECT, {"reading": "tolerant"}),
}


@pytest.mark.parametrize(("completion", "error", "rules"), INVALID.values(), ids=list(INVALID))
def test_invalid_format_earns_nothing(completion: str, error: FormatError, rules: dict[str, str]) -> None:
    judgement = judge(completion, TERMINATE, recipe(format=rules))
    assert judgement.failure is not None
    assert judgement.failure.error is error
    assert values(judgement) == (0.0, 0.0, 0.0, 0.0, 0.0)
    assert (judgement.prediction, judgement.similarity, judgement.is_exact_match) == (None, {}, False)
    assert judgement.certainty_span is None


def test_tolerant_reading_earns_in_full() -> None:
    completion = f"```json\n{answer(click('buy_now').to_dict(), 'Cheap.')}\n```"
    judgement = judge(completion, click("buy_now"), recipe(format={"reading": "tolerant"}))
    assert reward(judgement) == 1001.0
    assert judgement.certainty_span is not None
    assert completion[slice(*judgement.certainty_span)] == "Cheap."


@pytest.mark.parametrize("reading", ["strict", "tolerant"])
def test_end_tokens_do_not_count(reading: str) -> None:
    completion = answer(TERMINATE.to_dict()) + "<|im_end|>\n"
    rules = recipe(format={"reading": reading})
    judgement = judge(completion, TERMINATE, rules, ["<|im_end|>"])
    assert reward(judgement) == 0.8


# --- exact match ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "truth", "is_exact_match"),
    [
        (TERMINATE, TERMINATE, True),
        (click("buy_now"), click("buy_now"), True),
        (click("Buy-Now"), click("buy_now"), False),  # though ROUGE-L is 1
        (click("buy_now "), click("buy_now"), False),
        (click(""), click(""), True),
        (Action("click", {}), click(""), False),
        (Action("click", {"name": "a", "text": "b"}), click("a"), True),  # an extra key is no attribute
        (type_and_submit("a", "b"), type_and_submit("a", "c"), False),
        (click("buy_now"), TERMINATE, False),
    ],
)
def test_exact_match(predicted: Action, truth: Action, is_exact_match: bool) -> None:
    assert judged(predicted, truth).is_exact_match is is_exact_match


# --- where self-certainty is measured ---------------------------------------------------------------

COMPLETION = f" {answer({'type': 'terminate'}, 'Too dear.')}\n<|im_end|>"


@pytest.mark.parametrize(
    ("options", "rationale", "written"),
    [
        ({}, "Too dear.", "Too dear."),
        ({}, 'Too "dear".', r"Too \"dear\"."),
        ({}, "", None),
        ({"alpha": 0.0}, "Too dear.", None),
        ({"alpha": 0.0, "span": "completion"}, "Too dear.", None),
        ({"alpha": -1.0}, "Too dear.", "Too dear."),
    ],
)
def test_certainty_span(options: dict[str, Any], rationale: str, written: str | None) -> None:
    completion = answer({"type": "terminate"}, rationale)
    span = judge(completion, TERMINATE, recipe(self_certainty=options)).certainty_span
    assert (span and completion[slice(*span)]) == written


def test_certainty_span_of_the_completion_leaves_its_end_out() -> None:
    rules = recipe(self_certainty={"span": "completion"})
    judgement = judge(COMPLETION, TERMINATE, rules, ["<|im_end|>"])
    assert judgement.certainty_span == Span(0, COMPLETION.index("\n"))


# --- the sum ----------------------------------------------------------------------------------------


def test_reward_is_none_where_self_certainty_is() -> None:
    assert reward(judged(TERMINATE, TERMINATE), None) is None


def test_results_are_frozen() -> None:
    judgement = judged(TERMINATE, TERMINATE)
    with pytest.raises(AttributeError):
        judgement.failure = None  # type: ignore[misc]
    judgement.components({}).clear()
    assert values(judgement) == (0.5, 0.3, 0.0, 0.0, 0.0)


FLOATS = st.floats(-1e6, 1e6)


@given(FLOATS, FLOATS, FLOATS, FLOATS, FLOATS)
def test_reward_is_the_sum_from_left_to_right(a: float, b: float, c: float, d: float, e: float) -> None:
    assert total(dict(zip(SHOP_R1.components, (a, b, c, d, e), strict=True))) == a + b + c + d + e


def test_sum_is_plain_addition_on_every_python() -> None:
    # From Python 3.12 on, sum() of floats compensates for rounding and would give 0.6.
    assert total({"a": 0.1, "b": 0.2, "c": 0.3}) == 0.1 + 0.2 + 0.3 == 0.6000000000000001


# --- against Table 1, written out -------------------------------------------------------------------


def similarity(predicted: str, truth: str) -> float:
    """R(x)"""
    words = [re.findall("[a-z0-9]+", text.lower()) for text in (predicted, truth)]
    f1 = slow_f1(*words)
    return float(f1) if 4 * f1 > 3 else 0.0


def table_1(predicted: dict[str, str], truth: dict[str, str]) -> tuple[float, float, float, float]:
    if predicted["type"] != truth["type"]:
        return 0.5, 0.0, 0.0, 0.0
    match truth["type"]:
        case "terminate":
            return 0.5, 0.3, 0.0, 0.0
        case "click":
            name = predicted.get("name", "")
            return 0.5, 0.3, 0.2 if name else 0.0, 1000 * similarity(name, truth["name"])
        case _:
            name, text = predicted.get("name", ""), predicted.get("text", "")
            attribute = (0.1 if name else 0.0) + (0.1 if text else 0.0)
            value = 0.1 * similarity(name, truth["name"]) + 1000 * similarity(text, truth["text"])
            return 0.5, 0.3, attribute, value


WORDS = st.sampled_from(["nav", "bar", "Search", "input", "7", "-"])
VALUES = st.lists(WORDS, max_size=6).map("_".join)
TYPES = st.sampled_from(["terminate", "click", "type_and_submit"])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, str], dict[str, str]]:
    """A predicted and a true action, the one often an edit of the other."""
    truth = {"type": draw(TYPES), "name": draw(VALUES), "text": draw(VALUES)}
    predicted = {"type": draw(st.just(truth["type"]) | TYPES | st.just("scroll"))}
    for key in ("name", "text"):
        match draw(st.sampled_from(["same", "longer", "other", "absent"])):
            case "same":
                predicted[key] = truth[key]
            case "longer":
                predicted[key] = f"{truth[key]} {draw(WORDS)}"
            case "other":
                predicted[key] = draw(VALUES)
    return predicted, truth


@given(pairs())
def test_rewards_are_those_of_table_1(pair: tuple[dict[str, str], dict[str, str]]) -> None:
    predicted, truth = pair
    names = SHOP_R1.action_space.types[truth["type"]].attributes
    true_action = Action(truth["type"], {name: truth[name] for name in names})
    judgement = judge(answer(predicted), true_action, SHOP_R1)
    expected = table_1(predicted, truth)
    assert values(judgement, 0.13) == (*expected, 0.13)
    assert reward(judgement, 0.13) == expected[0] + expected[1] + expected[2] + expected[3] + 0.13


@given(st.text() | st.builds(answer, st.dictionaries(st.sampled_from(["type", "name"]), st.text())))
def test_judge_never_raises(completion: str) -> None:
    judgement = judge(completion, click("buy_now"), SHOP_R1)
    assert (judgement.failure is None) == (judgement.earned["format"] == 0.5)


# --- another action space ---------------------------------------------------------------------------

SCROLL = """
name = "scroll"
format.reward = -1.0
self_certainty.alpha = 0
[action_space]
dars = 8
[action_space.types.scroll]
reward = 2.0
attributes.direction = { presence = 0.5, value = 4 }
attributes.target = { value = "dars" }
"""


def test_recipe_decides_what_there_is_to_earn() -> None:
    truth = Action("scroll", {"direction": "down", "target": "reviews of the tea"})
    # type 2; presence 0.5, target's is 0; direction 4 · 1 + target 8 · 2·3/(3+4)
    predicted = Action("scroll", {"direction": "down", "target": "reviews of tea"})
    judgement = judged(predicted, truth, parse_recipe(SCROLL))
    assert values(judgement) == (-1.0, 2.0, 0.5, 4 + 8 * (6 / 7), 0.0)
    assert judgement.similarity == {"direction": 1.0, "target": 6 / 7}
