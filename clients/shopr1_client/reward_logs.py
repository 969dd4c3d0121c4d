"""A reward as flat numbers for a trainer's log."""

from shopr1_client.wire import Components, Reward

PREFIX = "shopr1/"
"""Before every key, in logs where others have theirs."""
LOG_KEYS = tuple(
    PREFIX + name
    for name in (
        *Components.model_fields,
        "self_certainty_nats",
        "has_self_certainty",
        "format_ok",
        "type_match",
        "exact_match",
        "num_rationale_tokens",
        "unscorable",
    )
)
"""The same for every rollout, scored or not: trainers read a batch by the keys of its first sample."""


def terms(reward: Reward) -> dict[str, float]:
    """The weighted terms; 0 for the one that could not be measured."""
    return {name: 0.0 if value is None else value for name, value in reward.components}


def log_values(reward: Reward) -> dict[str, float]:
    """Numbers under `LOG_KEYS`."""
    details, nats = reward.details, reward.details.self_certainty_nats
    values = (
        *terms(reward).values(),
        0.0 if nats is None else nats,
        nats is not None,
        details.format_error is None,
        details.type_match,
        details.exact_match,
        details.num_rationale_tokens,
        reward.reward is None,
    )
    return {key: float(value) for key, value in zip(LOG_KEYS, values, strict=True)}
