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
from types import MappingProxyType
from typing import NamedTuple

from shopr1_rewards.actions import Action, PredictedAction, read_prediction
from shopr1_rewards.completion import Envelope, parse_strict, parse_tolerant, strip_end
from shopr1_rewards.format_error import FormatFailure
from shopr1_rewards.recipe import Reading, Recipe, SpanChoice
from shopr1_rewards.similarity import Reference
from shopr1_rewards.strict_json import Span
from shopr1_rewards.terms import ValidAnswer, needs_policy, rule_terms


class Judgement(NamedTuple):
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
    similarity: Mapping[str, float] = MappingProxyType({})
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
    return Judge(truth, recipe, end_tokens)(completion)


class Judge:
    """A recipe's rules for answers to one question: `judge`, without repeating what they have in common."""

    def __init__(self, truth: Action, recipe: Recipe, end_tokens: Sequence[str] = ()) -> None:
        self._truth = truth
        self._true_attributes = dict(truth.attributes)
        self._recipe = recipe
        self._end_tokens = end_tokens
        self._needs_policy = needs_policy(recipe)
        self._is_strict = recipe.format.reading is Reading.STRICT
        self._references: dict[str, Reference] | None = None

    def __call__(self, completion: str) -> Judgement:
        """Apply the rules to a completion. Never raises an exception because of its text."""
        if self._is_strict:
            envelope = parse_strict(completion, self._end_tokens)
        else:
            envelope = self._read_tolerantly(completion)
        if isinstance(envelope, FormatFailure):
            return self._invalid(envelope)
        prediction = self._predict(envelope)
        if isinstance(prediction, FormatFailure):
            return self._invalid(prediction)
        return self._valid(prediction, self._span(envelope, completion) if self._needs_policy else None)

    def _read_tolerantly(self, completion: str) -> Envelope | FormatFailure:
        def check(envelope: Envelope) -> FormatFailure | None:
            prediction = self._predict(envelope)
            return prediction if isinstance(prediction, FormatFailure) else None

        return parse_tolerant(completion, self._end_tokens, self._recipe.format.which, check)

    def _predict(self, envelope: Envelope) -> PredictedAction | FormatFailure:
        return read_prediction(envelope, self._recipe.action_space, self._recipe.format)

    def _span(self, envelope: Envelope, completion: str) -> Span | None:
        span = envelope.rationale_span
        if self._recipe.self_certainty.span is SpanChoice.COMPLETION:
            span = Span(0, len(strip_end(completion, self._end_tokens)))
        return span if span.start < span.end else None

    def _invalid(self, failure: FormatFailure) -> Judgement:
        return Judgement(rule_terms(None, self._recipe), failure)

    def _valid(self, prediction: PredictedAction, span: Span | None) -> Judgement:
        predicted, truth = prediction.action, self._truth
        is_type_match = predicted.type == truth.type
        similarity = self._similarities(predicted) if is_type_match else {}
        answer = ValidAnswer(prediction, truth, is_type_match, similarity)
        return Judgement(
            rule_terms(answer, self._recipe),
            None,
            prediction,
            similarity,
            is_type_match,
            is_type_match and predicted.attributes == self._true_attributes,
            span,
        )

    def _similarities(self, predicted: Action) -> dict[str, float]:
        if self._references is None:
            tokenizer = self._recipe.similarity.tokenizer
            true = self._truth.attributes.items()
            self._references = {name: Reference(value, tokenizer) for name, value in true}
        given = predicted.attributes
        return {name: reference.f1(given.get(name, "")) for name, reference in self._references.items()}
