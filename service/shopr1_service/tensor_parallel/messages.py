"""What coordinator and participants say to each other, over pipes between processes of one user."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.engine import TokenGroup
from shopr1_service.source import Source

# --- from the coordinator ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """Join the others and load the policy.

    Attributes:
        port: where rank 0's store listens, on the loopback interface.
        settings: those that concern a policy, as `Settings.model_dump` gives them.
        overrides: of the model's own plan.
        num_threads: that each process computes with on a CPU.
    """

    num_ranks: int
    port: int
    source: Source
    settings: Mapping[str, Any]
    overrides: Mapping[str, str]
    num_threads: int


@dataclass(frozen=True)
class Measure:
    """Measure these groups."""

    groups: Sequence[TokenGroup]
    rules: SelfCertaintyRecipe


class Verdict(Enum):
    """How all go on after a try."""

    GO_ON = "go on"
    TRY_AGAIN = "memory was short somewhere: all try again with less"


# --- from a participant -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Least:
    """Asks for the least of all numbers."""

    number: int


class Outcome(Enum):
    """Of a try."""

    GOOD = "good"
    OUT_OF_MEMORY = "out of memory"
    FAILED = "failed"


@dataclass(frozen=True)
class Tried:
    """Asks how to go on after a try.

    Attributes:
        num_collectives: begun so far. Ranks that failed at different ones would take what the others do next
            for something else, and compute nonsense.
    """

    outcome: Outcome
    num_collectives: int
    message: str = ""


@dataclass(frozen=True)
class Done:
    """The task is done; rank 0 alone says what came of it, and at load all do."""

    result: Any = None


@dataclass(frozen=True)
class Failed:
    """The task is not done."""

    message: str
    is_policy_error: bool


def is_failure(message: object) -> bool:
    """Whether others may wait in vain for whoever says this."""
    return isinstance(message, Failed) or (isinstance(message, Tried) and message.outcome is not Outcome.GOOD)
