"""Ground truth in a trainer's label.

    {"type": …}                                      the action itself
    {"ground_truth": {"type": …}, "recipe": "…"}     with the recipe to score it with
    "…"                                              either of these as JSON in a string

Trainers pass one field of a data set to the reward, and most of them only a string.
"""

import json
import reprlib
from typing import Any

from shopr1_rewards import Action, GroundTruthError, Recipe, read_ground_truth
from shopr1_rewards.format_error import InvalidFormatError
from shopr1_rewards.strict_json import load
from shopr1_service.scoring.label_store import Label
from shopr1_service.scoring.recipe_book import RecipeBook

_TRUTH = "ground_truth"


class LabelError(ValueError):
    """A label that holds no ground truth.

    Attributes:
        path: the bad part of the label, to be appended to the label's own path.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


def is_missing(label: object) -> bool:
    """Whether a trainer has sent no label: null, or the empty string that OpenRLHF sends instead."""
    return label is None or label == ""


def parse_label(label: object, recipes: RecipeBook) -> Label:
    """The ground truth in a label, checked against its recipe.

    Raises:
        LabelError: not one of the forms above, no such recipe, or not an action of the recipe.
    """
    truth, name, path = _unwrap(label)
    if isinstance(label, str):
        path = ""  # inside a string there are no paths
    recipe = _recipe(name, recipes)
    if not isinstance(truth, str | dict):
        raise LabelError("must be an object or a JSON string", path)
    try:
        action = read_ground_truth(truth, recipe)
    except GroundTruthError as error:
        is_object = isinstance(label, dict) and isinstance(truth, dict)
        raise LabelError(str(error), f"{path}.{error.field}" if error.field and is_object else path) from None
    _refuse_contradiction(label, action, recipe)
    return Label.of(action, recipe.name)


def is_contradiction(label: object, other: object, recipes: RecipeBook) -> bool:
    """Whether both hold a ground truth, and not the same."""
    try:
        return parse_label(label, recipes) != parse_label(other, recipes)
    except LabelError:
        return False


def _refuse_contradiction(label: object, action: Action, recipe: Recipe) -> None:
    """Refuse an action around another one: `{"type": …, "ground_truth": {"type": …}}`."""
    around = _from_json(label) if isinstance(label, str) else label
    if not isinstance(around, dict) or _TRUTH not in around:
        return
    try:
        other = read_ground_truth(around, recipe)
    except GroundTruthError:
        return
    if other != action:
        raise LabelError(f"holds two actions: {other.to_dict()} and, in {_TRUTH!r}, {action.to_dict()}")


def _unwrap(label: object) -> tuple[Any, object, str]:
    """The ground truth, the recipe's name or None, and the ground truth's path in the label."""
    value = _from_json(label) if isinstance(label, str) else label
    # A data set's column of objects has the keys of all rows, with null in rows without the key.
    is_action = isinstance(value, dict) and value.get(_TRUTH) is None and value.get("type") is not None
    if isinstance(value, dict) and _TRUTH in value and not is_action:
        return value[_TRUTH], value.get("recipe"), f".{_TRUTH}"
    return label, None, ""


def _from_json(text: str) -> object:
    try:
        return load(text)
    except (InvalidFormatError, json.JSONDecodeError):
        return None  # reading it as a ground truth gives the error


def _recipe(name: object, recipes: RecipeBook) -> Recipe:
    recipe = recipes.get(name) if name is None or isinstance(name, str) else None
    if recipe is None:
        known = ", ".join(recipe.name for recipe in recipes)
        raise LabelError(f"no recipe {reprlib.repr(name)}; there are: {known}", ".recipe")
    return recipe
