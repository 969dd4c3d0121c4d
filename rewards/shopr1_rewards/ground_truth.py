"""The human's action: read from a label, and refused if no answer could earn its reward."""

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from shopr1_rewards.actions import Action
from shopr1_rewards.errors import GroundTruthError
from shopr1_rewards.format_error import InvalidFormatError
from shopr1_rewards.recipe import AttributeRecipe, Component, OnFlaw, Recipe
from shopr1_rewards.similarity import rouge_l_f1
from shopr1_rewards.strict_json import check_text, load

MAX_VALUE_CHARS = 8192
"""Longest value of an attribute. Comparing an answer with it takes time in proportion to both lengths."""


def read_ground_truth(value: str | Mapping[str, Any], recipe: Recipe) -> Action:
    """The human's action from an object or from a JSON string.

    Every attribute of its type is required, as a string. Other keys are ignored: data sets have more about an
    action than its type and attributes. With weights that are not negative, no answer earns more than the
    action itself.

    Raises:
        GroundTruthError: not an action of the recipe's action space, or one that could not earn its reward:
            an empty attribute that has a weight, a value without tokens; or a value that is longer than
            `MAX_VALUE_CHARS`. `field` names the key.
    """
    types = recipe.action_space.types
    fields = _load_object(value) if isinstance(value, str) else value
    type_name = _require_text(fields, "type")
    if type_name not in types:
        known = ", ".join(types)
        raise GroundTruthError(f"type {reprlib.repr(type_name)} is not in the action space ({known})", "type")
    of = f" of a {type_name!r} action"
    attributes = types[type_name].attributes
    action = Action(type_name, {name: _require_text(fields, name, of) for name in attributes})
    for name, attribute in attributes.items():
        if flaw := _why_not_earnable(action.attributes[name], attribute, recipe):
            raise GroundTruthError(f"{name!r}{of} {flaw}", name)
    return action


def _why_not_earnable(value: str, attribute: AttributeRecipe, recipe: Recipe) -> str | None:
    """The reason why an answer with exactly this value would not earn what the attribute can earn."""
    if len(value) > MAX_VALUE_CHARS:
        return f"has {len(value)} characters; at most {MAX_VALUE_CHARS} are compared"
    components = recipe.components
    presence = attribute.presence if Component.ATTRIBUTE in components else 0.0
    weight = recipe.action_space.value_weight(attribute) if Component.VALUE in components else 0.0
    if not value and recipe.format.missing_attribute is OnFlaw.REJECT:
        return "is empty, and the recipe rejects answers with an empty attribute"
    if not value and (presence or weight):
        return "is empty: any other value could earn a reward, but not this one"
    tokenizer = recipe.similarity.tokenizer
    if weight and recipe.similarity.thresholded(rouge_l_f1(value, value, tokenizer)) == 0:
        return f"has no token: {reprlib.repr(value)} earns nothing with tokenizer = {tokenizer.value!r}"
    return None


def _load_object(text: str) -> Mapping[str, Any]:
    try:
        value = load(text)
    except InvalidFormatError as exception:
        raise GroundTruthError(f"not valid JSON: {exception}") from None
    except json.JSONDecodeError as error:
        raise GroundTruthError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise GroundTruthError("not a JSON object")
    return value


def _require_text(fields: Mapping[str, Any], key: str, of: str = "") -> str:
    if key not in fields:
        raise GroundTruthError(f"{key!r}{of} is missing", key)
    value = fields[key]
    if not isinstance(value, str):
        raise GroundTruthError(f"{key!r}{of} must be a string, not {reprlib.repr(value)}", key)
    try:
        check_text(value)
    except InvalidFormatError as exception:
        raise GroundTruthError(f"{key!r}{of} is not valid text: {exception}", key) from None
    return value
