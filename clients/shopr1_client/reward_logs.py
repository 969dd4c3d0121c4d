"""Flat numbers of a reward for a trainer's log."""

from collections.abc import Iterable, Mapping
from typing import Protocol

PREFIX = "shopr1/"
"""Prefix of every key, because trainers' logs have keys of others."""
_DETAILS = (
    "self_certainty_nats",
    "has_self_certainty",
    "format_ok",
    "type_match",
    "exact_match",
    "num_rationale_tokens",
    "unscorable",
)


class DetailsLike(Protocol):
    """Details of a reward: the wire model, or an object with its fields."""

    @property
    def self_certainty_nats(self) -> float | None: ...
    @property
    def format_error(self) -> str | None: ...
    @property
    def type_match(self) -> bool: ...
    @property
    def exact_match(self) -> bool: ...
    @property
    def num_rationale_tokens(self) -> int: ...


class RewardLike(Protocol):
    """A reward: the wire model, or an object with its fields."""

    @property
    def reward(self) -> float | None: ...
    @property
    def components(self) -> Mapping[str, float | None]: ...
    @property
    def details(self) -> DetailsLike: ...


def log_keys(components: Iterable[str]) -> tuple[str, ...]:
    """The keys of `log_values` for a recipe with these components.

    They are the same for every rollout, scored or not: trainers read a batch by the keys of its first sample.
    """
    return tuple(PREFIX + name for name in (*components, *_DETAILS))


def terms(reward: RewardLike) -> dict[str, float]:
    """The weighted terms; 0 for one that could not be measured."""
    return {name: 0.0 if value is None else value for name, value in reward.components.items()}


def log_values(reward: RewardLike) -> dict[str, float]:
    """Numbers under `log_keys`."""
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
    return {key: float(value) for key, value in zip(log_keys(reward.components), values, strict=True)}
