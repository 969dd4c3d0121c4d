"""The reward of one rollout (Shop-R1, arXiv 2507.17842, Table 1).

    reward = format + action_type + attribute + value + self_certainty

    format          what the recipe gives for valid output, else 0; where it is 0, all the rest is 0
    action_type     what the recipe gives for the true type, if the predicted type is the true one
    attribute       Σ over the type's attributes: its `presence` weight, if the predicted one is not empty
    value           Σ over the type's attributes: its `value` weight · R(predicted, true)
    self_certainty  alpha · s,  s in nats per token (`self_certainty.py`)

    R(x, y) = ROUGE-L F1(x, y) where that passes the threshold, else 0

Attribute and value are earned only when the type is right. Each term is kept already weighted, so that
the terms sum to the reward.

The work is in two halves, because only the second needs a model: `judge` applies the rules to the text and
says whether and where self-certainty is wanted; `Judgement.components` puts the two together.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce

from shopr1_rewards.actions import Action, PredictedAction, read_prediction
from shopr1_rewards.completion import parse_strict, parse_tolerant, strip_end
from shopr1_rewards.format_error import FormatFailure
from shopr1_rewards.recipe import ActionSpace, Reading, Recipe, SimilarityRecipe, SpanChoice
from shopr1_rewards.similarity import rouge_l_f1
from shopr1_rewards.strict_json import Span


@dataclass(frozen=True)
class Components:
    """The terms of the reward, weighted. `self_certainty` is None where it was wanted and not measured."""

    format: float
    action_type: float
    attribute: float
    value: float
    self_certainty: float | None

    @property
    def reward(self) -> float | None:
        """The sum of the terms in the order above, or None if one is missing."""
        terms = [getattr(self, field.name) for field in fields(self)]
        return None if None in terms else _add(terms)


@dataclass(frozen=True)
class Judgement:
    """What the rules say about one completion.

    Attributes:
        failure: why the format is invalid, or None.
        prediction: the predicted action; None where the format is invalid.
        similarity: ROUGE-L F1 per attribute, before the threshold; only attributes that were compared.
        is_type_match: whether the predicted type is the human's.
        is_exact_match: whether type and all attributes equal the human's, character for character.
        certainty_span: the characters of the raw completion whose tokens self-certainty is averaged over;
            None where it is not wanted: invalid format, nothing in the span, or `alpha = 0`.
    """

    format: float
    action_type: float
    attribute: float
    value: float
    failure: FormatFailure | None
    prediction: PredictedAction | None
    similarity: Mapping[str, float]
    is_type_match: bool
    is_exact_match: bool
    certainty_span: Span | None

    def components(self, self_certainty: float | None) -> Components:
        """The terms with the weighted self-certainty filled in."""
        return Components(self.format, self.action_type, self.attribute, self.value, self_certainty)


def judge(completion: str, truth: Action, recipe: Recipe, end_tokens: Sequence[str] = ()) -> Judgement:
    """Apply a recipe's rules to one completion. Never raises on what the completion says.

    Args:
        completion: the raw text of the policy's answer.
        truth: the human's action (`read_ground_truth`).
        recipe: the rules.
        end_tokens: the policy's end-of-turn and padding tokens, which do not count at the end.

    >>> from shopr1_rewards import load_recipe
    >>> answer = '{"rationale": "Too dear.", "action": {"type": "terminate"}}'
    >>> judge(answer, Action("terminate", {}), load_recipe("shop_r1")).components(0.13).reward
    0.93
    """
    parse = parse_strict if recipe.format.reading is Reading.STRICT else parse_tolerant
    envelope = parse(completion, end_tokens)
    if isinstance(envelope, FormatFailure):
        return _invalid(envelope)
    prediction = read_prediction(envelope, recipe.action_space, recipe.format)
    if isinstance(prediction, FormatFailure):
        return _invalid(prediction)
    span = envelope.rationale_span
    if recipe.self_certainty.span is SpanChoice.COMPLETION:
        span = Span(0, len(strip_end(completion, end_tokens)))
    wanted = recipe.self_certainty.alpha != 0 and span.start < span.end
    return _valid(prediction, truth, recipe, span if wanted else None)


def _invalid(failure: FormatFailure) -> Judgement:
    return Judgement(0.0, 0.0, 0.0, 0.0, failure, None, {}, False, False, None)


def _valid(prediction: PredictedAction, truth: Action, recipe: Recipe, span: Span | None) -> Judgement:
    predicted, space = prediction.action, recipe.action_space
    if predicted.type != truth.type:
        return Judgement(recipe.format.reward, 0.0, 0.0, 0.0, None, prediction, {}, False, False, span)
    similarity = _similarities(predicted, truth, recipe.similarity)
    return Judgement(
        format=recipe.format.reward,
        action_type=space.types[truth.type].reward,
        attribute=_attribute_reward(predicted, space),
        value=_value_reward(truth.type, similarity, recipe),
        failure=None,
        prediction=prediction,
        similarity=similarity,
        is_type_match=True,
        is_exact_match=dict(predicted.attributes) == dict(truth.attributes),
        certainty_span=span,
    )


def _similarities(predicted: Action, truth: Action, rules: SimilarityRecipe) -> dict[str, float]:
    return {
        name: rouge_l_f1(predicted.attributes.get(name, ""), true_value, rules.tokenizer)
        for name, true_value in truth.attributes.items()
    }


def _attribute_reward(predicted: Action, space: ActionSpace) -> float:
    attributes = space.types[predicted.type].attributes
    return _add(a.presence for name, a in attributes.items() if predicted.attributes.get(name))


def _value_reward(action_type: str, similarity: Mapping[str, float], recipe: Recipe) -> float:
    space = recipe.action_space
    return _add(
        space.value_weight(attribute) * recipe.similarity.thresholded(similarity[name])
        for name, attribute in space.types[action_type].attributes.items()
    )


def _add(terms: Iterable[float]) -> float:
    """Plain addition from left to right: since Python 3.12 `sum` compensates, and would round otherwise."""
    return reduce(operator.add, terms, 0.0)
