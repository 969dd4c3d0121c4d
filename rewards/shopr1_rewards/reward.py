"""The reward of one rollout, the sum of the components that its recipe declares.

Shop-R1's (arXiv 2507.17842, Table 1):

    reward = format + action_type + attribute + value + self_certainty

    format          the recipe's reward of valid output, which may be 0
    action_type     the recipe's reward of the true type, if it is predicted
    attribute       Σ over the type's attributes: its `presence` weight, if the predicted one is not empty
    value           Σ over the type's attributes: its `value` weight · R(predicted, true)
    self_certainty  alpha · s,  s in nats per token (`self_certainty.py`)

    R(x, y) = ROUGE-L F1(x, y) if that passes the threshold, else 0

In invalid format all components are 0. Attribute and value are earned only when the type is right. Each
component is already weighted, so that they sum to the reward. `terms.py` has their rules.

There are two steps, because only the second needs a model: `judge` applies the rules to the text and finds
the span of self-certainty; `Judgement.components` adds the measured terms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shopr1_rewards.actions import Action, PredictedAction, read_prediction
from shopr1_rewards.completion import Envelope, parse_strict, parse_tolerant, strip_end
from shopr1_rewards.format_error import FormatFailure
from shopr1_rewards.recipe import Reading, Recipe, SimilarityRecipe, SpanChoice
from shopr1_rewards.similarity import rouge_l_f1
from shopr1_rewards.strict_json import Span
from shopr1_rewards.terms import ValidAnswer, needs_policy, rule_terms


@dataclass(frozen=True)
class Judgement:
    """The verdict of the rules on one completion.

    Attributes:
        earned: the recipe's components in its order, weighted; 0 for those that are still to be measured.
        failure: why the format is invalid, or None.
        prediction: the predicted action; None where the format is invalid.
        similarity: ROUGE-L F1 per attribute, before the threshold; only attributes that were compared.
        is_type_match: whether the predicted type is the human's.
        is_exact_match: whether type and all attributes, as they were read, equal the human's, character for
            character.
        certainty_span: the characters of the raw completion whose tokens self-certainty is averaged over;
            None where it is not needed: invalid format, an empty span, or no weight of self-certainty.
    """

    earned: Mapping[str, float]
    failure: FormatFailure | None = None
    prediction: PredictedAction | None = None
    similarity: Mapping[str, float] = field(default_factory=dict)
    is_type_match: bool = False
    is_exact_match: bool = False
    certainty_span: Span | None = None

    def components(self, measured: Mapping[str, float | None]) -> dict[str, float | None]:
        """All components in the recipe's order.

        Args:
            measured: those of `terms.measured_terms`; empty where there was no token to measure.
        """
        return {**self.earned, **measured}


def judge(completion: str, truth: Action, recipe: Recipe, end_tokens: Sequence[str] = ()) -> Judgement:
    """Apply a recipe's rules to a completion. Never raises an exception because of its text.

    Args:
        completion: the raw text of the policy's answer.
        truth: the human's action (`read_ground_truth`).
        recipe: the rules.
        end_tokens: the policy's end-of-turn and padding tokens, which are ignored at the end.

    >>> from shopr1_rewards import load_recipe, measured_terms, total
    >>> answer, recipe = '{"rationale": "Too dear.", "action": {"type": "terminate"}}', load_recipe("shop_r1")
    >>> judgement = judge(answer, Action("terminate", {}), recipe)
    >>> total(judgement.components(measured_terms(26.0, recipe)))
    0.93
    """
    envelope = _read(completion, recipe, end_tokens)
    if isinstance(envelope, FormatFailure):
        return _invalid(envelope, recipe)
    prediction = read_prediction(envelope, recipe.action_space, recipe.format)
    if isinstance(prediction, FormatFailure):
        return _invalid(prediction, recipe)
    span = envelope.rationale_span
    if recipe.self_certainty.span is SpanChoice.COMPLETION:
        span = Span(0, len(strip_end(completion, end_tokens)))
    is_needed = needs_policy(recipe) and span.start < span.end
    return _valid(prediction, truth, recipe, span if is_needed else None)


def _read(completion: str, recipe: Recipe, end_tokens: Sequence[str]) -> Envelope | FormatFailure:
    if recipe.format.reading is Reading.STRICT:
        return parse_strict(completion, end_tokens)

    def check(envelope: Envelope) -> FormatFailure | None:
        prediction = read_prediction(envelope, recipe.action_space, recipe.format)
        return prediction if isinstance(prediction, FormatFailure) else None

    return parse_tolerant(completion, end_tokens, recipe.format.which, check)


def _invalid(failure: FormatFailure, recipe: Recipe) -> Judgement:
    return Judgement(rule_terms(None, recipe), failure)


def _valid(prediction: PredictedAction, truth: Action, recipe: Recipe, span: Span | None) -> Judgement:
    predicted = prediction.action
    is_type_match = predicted.type == truth.type
    similarity = _similarities(predicted, truth, recipe.similarity) if is_type_match else {}
    return Judgement(
        earned=rule_terms(ValidAnswer(prediction, truth, is_type_match, similarity), recipe),
        prediction=prediction,
        similarity=similarity,
        is_type_match=is_type_match,
        is_exact_match=is_type_match and dict(predicted.attributes) == dict(truth.attributes),
        certainty_span=span,
    )


def _similarities(predicted: Action, truth: Action, rules: SimilarityRecipe) -> dict[str, float]:
    return {
        name: rouge_l_f1(predicted.attributes.get(name, ""), true_value, rules.tokenizer)
        for name, true_value in truth.attributes.items()
    }
