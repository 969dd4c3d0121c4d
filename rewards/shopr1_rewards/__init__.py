"""Rules of the reward, without HTTP and without a model.

Only `shopr1_rewards.self_certainty` needs torch; it is not imported here.
"""

from shopr1_rewards.actions import Action, PredictedAction, read_prediction
from shopr1_rewards.completion import Envelope, parse_strict, parse_tolerant
from shopr1_rewards.errors import GroundTruthError, RecipeError, RewardsError
from shopr1_rewards.format_error import FormatError, FormatFailure
from shopr1_rewards.ground_truth import read_ground_truth
from shopr1_rewards.recipe import Component, Recipe, load_recipe, parse_recipe, recipe_names
from shopr1_rewards.reward import Judge, Judgement, judge
from shopr1_rewards.similarity import Tokenizer, rouge_l_f1, tokenize
from shopr1_rewards.strict_json import Span
from shopr1_rewards.terms import measured_terms, needs_policy, total

__all__ = [
    "Action",
    "Component",
    "Envelope",
    "FormatError",
    "FormatFailure",
    "GroundTruthError",
    "Judge",
    "Judgement",
    "PredictedAction",
    "Recipe",
    "RecipeError",
    "RewardsError",
    "Span",
    "Tokenizer",
    "judge",
    "load_recipe",
    "measured_terms",
    "needs_policy",
    "parse_recipe",
    "parse_strict",
    "parse_tolerant",
    "read_ground_truth",
    "read_prediction",
    "recipe_names",
    "rouge_l_f1",
    "tokenize",
    "total",
]
