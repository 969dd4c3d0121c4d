"""The rules behind a reward's components. Each gives the value of one component, already weighted.

    RULES      from the text and the actions alone      rule(answer, recipe)
    MEASURED   from statistics of the policy's tokens   weight(recipe) · s

A completion in invalid format earns 0 in every component; no rule sees it.

To add a component: name it in `recipe.Component`, write its rule here, enter the rule in one of the two
tables, list the name in a recipe's `components`, and run `make openapi`. Responses, the client, metrics, logs
and the dashboard follow the recipe.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from shopr1_rewards.actions import Action, PredictedAction
from shopr1_rewards.recipe import Component, Recipe


class ValidAnswer(NamedTuple):
    """A completion in valid format beside the human's action.

    Attributes:
        is_type_match: whether the predicted type is the human's.
        similarity: ROUGE-L F1 per attribute, before the threshold; empty where the types differ.
    """

    prediction: PredictedAction
    truth: Action
    is_type_match: bool
    similarity: Mapping[str, float]


def _format(answer: ValidAnswer, recipe: Recipe) -> float:
    """The recipe's reward of valid output."""
    return recipe.format.reward


def _action_type(answer: ValidAnswer, recipe: Recipe) -> float:
    """The true type's reward, if it is predicted."""
    return recipe.action_space.types[answer.truth.type].reward if answer.is_type_match else 0.0


def _attribute(answer: ValidAnswer, recipe: Recipe) -> float:
    """Σ over the true type's attributes: `presence`, if the predicted one is not empty. Wrong type: 0."""
    if not answer.is_type_match:
        return 0.0
    predicted = answer.prediction.action.attributes
    earned = 0.0
    for name, attribute in recipe.action_space.types[answer.truth.type].attributes.items():
        if predicted.get(name):
            earned += attribute.presence
    return earned


def _value(answer: ValidAnswer, recipe: Recipe) -> float:
    """Σ over the true type's attributes: value weight · R(predicted, true). Wrong type: 0."""
    if not answer.is_type_match:
        return 0.0
    space, rules = recipe.action_space, recipe.similarity
    earned = 0.0
    for name, attribute in space.types[answer.truth.type].attributes.items():
        earned += space.value_weight(attribute) * rules.thresholded(answer.similarity[name])
    return earned


def _self_certainty(recipe: Recipe) -> float:
    """alpha; s is the mean self-certainty of the span in nats per token (`self_certainty.py`)."""
    return recipe.self_certainty.alpha


RULES: Mapping[str, Callable[[ValidAnswer, Recipe], float]] = {
    Component.FORMAT.value: _format,
    Component.ACTION_TYPE.value: _action_type,
    Component.ATTRIBUTE.value: _attribute,
    Component.VALUE.value: _value,
}
MEASURED: Mapping[str, Callable[[Recipe], float]] = {Component.SELF_CERTAINTY.value: _self_certainty}


def rule_terms(answer: ValidAnswer | None, recipe: Recipe) -> dict[str, float]:
    """All components that the recipe declares, in its order; 0 for those that the policy's tokens decide.

    Args:
        answer: None where the format is invalid.
    """
    if answer is None:
        return dict.fromkeys(recipe.component_names, 0.0)
    return {
        name: rule(answer, recipe) if (rule := RULES.get(name)) else 0.0 for name in recipe.component_names
    }


def needs_policy(recipe: Recipe) -> bool:
    """Whether any component with a weight depends on the policy's tokens."""
    return bool(measured_terms(None, recipe))


def measured_terms(nats: float | None, recipe: Recipe) -> dict[str, float | None]:
    """The components that the policy's tokens decide, without those whose weight is 0.

    Args:
        nats: s; None where measuring it failed, which makes the components None.
    """
    return {
        name: None if nats is None else weight * nats
        for name in recipe.component_names
        if name in MEASURED and (weight := MEASURED[name](recipe))
    }


def total(components: Mapping[str, float | None]) -> float | None:
    """The reward: the sum of its components in their order, or None if one is missing."""
    reward = 0.0
    for term in components.values():
        if term is None:
            return None
        reward += term
    return reward
