"""Actions, and the policy's action, validated against a recipe's action space."""

import json
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from shopr1_rewards.completion import Envelope, wrong_type_message
from shopr1_rewards.format_error import FormatError, FormatFailure
from shopr1_rewards.recipe import ActionSpace, AttributeTypes, FormatRecipe, OnFlaw
from shopr1_rewards.strict_json import Number

# Python 3.11 looks up a member of an enumeration by a function of Python: too slow for every rollout.
_REJECT, _SCALAR = OnFlaw.REJECT, AttributeTypes.SCALAR


class Action(NamedTuple):
    """A type and its attributes."""

    type: str
    attributes: Mapping[str, str]

    def to_dict(self) -> dict[str, str]:
        """As the policy writes it: `{"type": …, "name": …}`."""
        return {"type": self.type, **self.attributes}


class PredictedAction(NamedTuple):
    """The policy's action and its flaws. The recipe decides whether a flaw invalidates the format.

    Attributes:
        is_known_type: whether the action space has the type.
        missing_attributes: attributes of the type that are absent or empty.
        extra_keys: paths of keys that the format does not have, such as `action.confidence`.
        converted: paths of fields that only a lenient recipe reads: a type in other case, a number or boolean
            as text, null as a key left out.
    """

    action: Action
    is_known_type: bool
    missing_attributes: tuple[str, ...]
    extra_keys: tuple[str, ...]
    converted: tuple[str, ...] = ()


def read_prediction(
    envelope: Envelope, space: ActionSpace, rules: FormatRecipe
) -> PredictedAction | FormatFailure:
    """The action of an answer, or the reason why the answer is invalid."""
    known_name = space.find_type(envelope.action_type, rules.action_types)
    is_lenient = rules.attribute_types is _SCALAR
    fields = _without_nulls(envelope.fields) if is_lenient else envelope.fields
    # The attributes of an unknown type are unknown: all its text fields are reported.
    names = space.types[known_name].attributes if known_name else _text_fields(fields, rules)
    attributes: dict[str, str] = {}
    for name in names:
        if name in fields:
            value = fields[name]
            text = value if isinstance(value, str) else _as_text(value, rules)
            if text is None:
                message = wrong_type_message(f"action.{name}", value, str)
                return FormatFailure(FormatError.WRONG_TYPE, message)
            attributes[name] = text
    extra_keys = envelope.extra_keys
    if len(fields) > len(attributes):
        extra_keys += tuple(f"action.{key}" for key in fields if key not in attributes)
    is_as_written = not is_lenient and known_name in (None, envelope.action_type)
    prediction = PredictedAction(
        Action(known_name or envelope.action_type, attributes),
        known_name is not None,
        tuple([name for name in names if not attributes.get(name)]) if known_name else (),
        extra_keys,
        () if is_as_written else tuple(_converted_keys(envelope, fields, known_name, attributes)),
    )
    return _rejection(prediction, rules) or prediction


def _is_lenient(rules: FormatRecipe) -> bool:
    return rules.attribute_types is _SCALAR


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _text_fields(fields: Mapping[str, Any], rules: FormatRecipe) -> list[str]:
    return [key for key, value in fields.items() if _as_text(value, rules) is not None]


def _as_text(value: object, rules: FormatRecipe) -> str | None:
    """The text of an attribute, or None if the recipe does not accept its JSON type."""
    match value:
        case str():
            return value
        case bool() if _is_lenient(rules):
            return json.dumps(value)
        case Number() if _is_lenient(rules):
            return value.written
        case _:
            return None


def _converted_keys(
    envelope: Envelope, fields: Mapping[str, Any], known_name: str | None, attributes: Mapping[str, str]
) -> Iterator[str]:
    if known_name not in (None, envelope.action_type):
        yield "action.type"
    for key, value in envelope.fields.items():
        if key not in fields or (key in attributes and not isinstance(value, str)):
            yield f"action.{key}"


def _rejection(prediction: PredictedAction, rules: FormatRecipe) -> FormatFailure | None:
    if rules.unknown_action_type is _REJECT and not prediction.is_known_type:
        message = f"action.type {reprlib.repr(prediction.action.type)} is not in the action space"
        return FormatFailure(FormatError.UNKNOWN_ACTION_TYPE, message)
    if rules.missing_attribute is _REJECT and prediction.missing_attributes:
        message = f"action.{prediction.missing_attributes[0]} is missing or empty"
        return FormatFailure(FormatError.MISSING_ATTRIBUTE, message)
    if rules.extra_key is _REJECT and prediction.extra_keys:
        return FormatFailure(
            FormatError.EXTRA_KEY, f"key {reprlib.repr(prediction.extra_keys[0])} is not allowed"
        )
    return None
