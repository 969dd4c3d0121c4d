"""Flat numbers of a reward: the same keys for every rollout of a recipe."""

from typing import Any

import pytest

from shopr1_client.reward_logs import log_keys, log_values, terms
from shopr1_client.wire import Details, Reward

DETAILS: dict[str, Any] = {
    "format_error": None,
    "format_message": None,
    "predicted_action": {"type": "terminate"},
    "unknown_action_type": False,
    "missing_attributes": [],
    "extra_keys": [],
    "similarity": {},
    "type_match": True,
    "exact_match": True,
    "self_certainty_nats": 26.0,
    "num_rationale_tokens": 4,
}


def reward(value: float | None, components: dict[str, float | None], **details: Any) -> Reward:
    return Reward.model_validate(
        {
            "reward": value,
            "status": "scored" if value is not None else "unscorable",
            "reason": None if value is not None else "out_of_memory",
            "message": None,
            "components": components,
            "details": Details.model_validate({**DETAILS, **details}),
        }
    )


def test_components_are_first_and_in_order() -> None:
    values = log_values(reward(0.63, {"certainty": 0.13, "format": 0.5}))
    assert values == {
        "shopr1/certainty": 0.13,
        "shopr1/format": 0.5,
        "shopr1/self_certainty_nats": 26.0,
        "shopr1/has_self_certainty": 1.0,
        "shopr1/format_ok": 1.0,
        "shopr1/type_match": 1.0,
        "shopr1/exact_match": 1.0,
        "shopr1/num_rationale_tokens": 4.0,
        "shopr1/unscorable": 0.0,
    }
    assert tuple(values) == log_keys(["certainty", "format"])
    assert {type(value) for value in values.values()} == {float}


@pytest.mark.parametrize(
    ("value", "certainty", "details", "expected"),
    [
        (None, None, {"self_certainty_nats": None}, {"has_self_certainty": 0, "unscorable": 1}),
        (0.0, 0.0, {"format_error": "empty", "self_certainty_nats": None}, {"format_ok": 0, "unscorable": 0}),
    ],
)
def test_keys_do_not_depend_on_the_rollout(
    value: float | None, certainty: float | None, details: dict[str, Any], expected: dict[str, float]
) -> None:
    sent = reward(value, {"certainty": certainty}, **details)
    values = log_values(sent)
    assert tuple(values) == log_keys(["certainty"])
    assert terms(sent) == {"certainty": 0.0}
    assert values["shopr1/certainty"] == values["shopr1/self_certainty_nats"] == 0.0
    assert {key: values[f"shopr1/{key}"] for key in expected} == expected
