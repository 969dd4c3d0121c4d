"""The policy's and the human's actions, validated against a recipe's action space."""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shopr1_rewards.completion import Envelope, wrong_type_message
from shopr1_rewards.errors import GroundTruthError
from shopr1_rewards.format_error import FormatError, FormatFailure, InvalidFormatError
from shopr1_rewards.recipe import ActionSpace, FormatRecipe, OnFlaw
from shopr1_rewards.strict_json import check_text, load


@dataclass(frozen=True)
class Action:
    """A type and its attributes."""

    type: str
    attributes: Mapping[str, str]

    def to_dict(self) -> dict[str, str]:
        """As the policy writes it: `{"type": …, "name": …}`."""
        return {"type": self.type, **self.attributes}


@dataclass(frozen=True)
class PredictedAction:
    """The policy's action and its flaws. The recipe decides whether a flaw invalidates the format.

    Attributes:
        is_known_type: whether the action space has the type.
        missing_attributes: attributes of the type that are absent or empty.
        extra_keys: paths of keys that the format does not have, such as `action.confidence`.
    """

    action: Action
    is_known_type: bool
    missing_attributes: tuple[str, ...]
    extra_keys: tuple[str, ...]


def read_prediction(
    envelope: Envelope, space: ActionSpace, rules: FormatRecipe
) -> PredictedAction | FormatFailure:
    """The action of an answer, or the reason why the answer is invalid."""
    action_type = space.types.get(envelope.action_type)
    # The attributes of an unknown type are unknown: all its text fields are reported.
    names = list(action_type.attributes if action_type else _text_fields(envelope))
    attributes = {name: envelope.fields[name] for name in names if name in envelope.fields}
    for name, value in attributes.items():
        if not isinstance(value, str):
            message = wrong_type_message(f"action.{name}", value, str)
            return FormatFailure(FormatError.WRONG_TYPE, message)
    prediction = PredictedAction(
        action=Action(envelope.action_type, attributes),
        is_known_type=action_type is not None,
        missing_attributes=tuple(name for name in names if not attributes.get(name)) if action_type else (),
        extra_keys=envelope.extra_keys
        + tuple(f"action.{key}" for key in envelope.fields if key not in attributes),
    )
    return _rejection(prediction, rules) or prediction


def _text_fields(envelope: Envelope) -> list[str]:
    return [key for key, value in envelope.fields.items() if isinstance(value, str)]


def _rejection(prediction: PredictedAction, rules: FormatRecipe) -> FormatFailure | None:
    if rules.unknown_action_type is OnFlaw.REJECT and not prediction.is_known_type:
        message = f"action.type {reprlib.repr(prediction.action.type)} is not in the action space"
        return FormatFailure(FormatError.UNKNOWN_ACTION_TYPE, message)
    if rules.missing_attribute is OnFlaw.REJECT and prediction.missing_attributes:
        message = f"action.{prediction.missing_attributes[0]} is missing or empty"
        return FormatFailure(FormatError.MISSING_ATTRIBUTE, message)
    if rules.extra_key is OnFlaw.REJECT and prediction.extra_keys:
        return FormatFailure(
            FormatError.EXTRA_KEY, f"key {reprlib.repr(prediction.extra_keys[0])} is not allowed"
        )
    return None


def read_ground_truth(value: str | Mapping[str, Any], space: ActionSpace) -> Action:
    """The human's action from an object or from a JSON string.

    Every attribute of its type is required, as a string, which may be empty. Other keys are ignored: data
    sets have more about an action than its type and attributes.

    Raises:
        GroundTruthError: not an action of this action space; `field` names the key.
    """
    fields = _load_object(value) if isinstance(value, str) else value
    type_name = _require_text(fields, "type")
    if type_name not in space.types:
        known = ", ".join(space.types)
        raise GroundTruthError(f"type {reprlib.repr(type_name)} is not in the action space ({known})", "type")
    names = space.types[type_name].attributes
    return Action(
        type_name, {name: _require_text(fields, name, f" of a {type_name!r} action") for name in names}
    )


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
