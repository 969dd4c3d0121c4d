"""Components: every one has a rule, and a recipe has those that it declares, in its order."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_rewards import Component, Recipe, judge, measured_terms, needs_policy, total
from shopr1_rewards.terms import MEASURED, RULES, rule_terms
from tests.support.completions import SHOP_R1, answer, click

BUY = click("buy_now")
EARNED = {"format": 0.5, "action_type": 0.3, "attribute": 0.2, "value": 1000.0, "self_certainty": 0.0}


def recipe(*components: Component, **self_certainty: Any) -> Recipe:
    """Shop-R1 with these components."""
    content = SHOP_R1.model_dump()
    return Recipe.model_validate(
        {
            **content,
            "components": components or SHOP_R1.components,
            "self_certainty": {**content["self_certainty"], **self_certainty},
        }
    )


def test_every_component_has_one_rule() -> None:
    assert sorted([*RULES, *MEASURED]) == sorted(Component)


@given(st.lists(st.sampled_from(Component), min_size=1, unique=True))
def test_components_are_those_of_the_recipe_in_its_order(components: list[Component]) -> None:
    judgement = judge(answer(BUY.to_dict()), BUY, recipe(*components))
    assert list(judgement.earned.items()) == [(name.value, EARNED[name]) for name in components]
    measured = measured_terms(26.0, recipe(*components))
    assert list(judgement.components(measured)) == components


@pytest.mark.parametrize("components", [(), (Component.FORMAT, Component.SELF_CERTAINTY)])
def test_names_are_plain_strings(components: tuple[Component, ...]) -> None:
    rules = recipe(*components)
    assert {type(name) for name in [*rule_terms(None, rules), *measured_terms(1.0, rules)]} == {str}


def test_invalid_format_earns_nothing_in_any_component() -> None:
    assert rule_terms(None, SHOP_R1) == dict.fromkeys(EARNED, 0.0)


@pytest.mark.parametrize(
    ("rules", "is_needed"),
    [
        (SHOP_R1, True),
        (recipe(alpha=-1.0), True),
        (recipe(alpha=0.0), False),
        (recipe(Component.FORMAT, Component.VALUE), False),
        (recipe(Component.SELF_CERTAINTY), True),
    ],
)
def test_the_policy_is_needed_only_for_measured_components_with_a_weight(
    rules: Recipe, is_needed: bool
) -> None:
    assert needs_policy(rules) is is_needed
    expected = {"self_certainty": rules.self_certainty.alpha * 26} if is_needed else {}
    assert measured_terms(26.0, rules) == expected
    assert measured_terms(None, rules) == dict.fromkeys(expected)
    assert (judge(answer(BUY.to_dict()), BUY, rules).certainty_span is not None) is is_needed


def test_total_follows_the_order() -> None:
    assert total({"a": 1e16, "b": 1.0, "c": -1e16}) == 0.0
    assert total({"a": 1e16, "c": -1e16, "b": 1.0}) == 1.0
    assert total({"a": 1.0, "b": None}) is None
    assert total({}) == 0.0
