"""Answers as plain objects, which `orjson` writes as they are.

A pydantic object for each rollout takes longer to make and to write than its rules take. Each class here has
the fields of the wire model of its name (`shopr1_client.wire`), in its order. The models describe what an
answer looks like; objects of this module are never made of anything from outside.

Without `slots`: `orjson` writes an object that has a `__dict__` three times as fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shopr1_client.wire import PolicyRef, Reason, RecipeRef, Status
from shopr1_client.wire_prompt import ScoreWarning


@dataclass
class TokenCertainty:
    """A measured token."""

    index: int
    token_id: int
    value: float


@dataclass
class Details:
    """Explanation of a reward."""

    format_error: str | None
    format_message: str | None
    predicted_action: dict[str, str] | None
    unknown_action_type: bool
    missing_attributes: Sequence[str]
    extra_keys: Sequence[str]
    converted: Sequence[str]
    similarity: dict[str, float | None]
    type_match: bool
    exact_match: bool
    self_certainty_nats: float | None
    num_rationale_tokens: int
    tokens: list[TokenCertainty] | None = None
    completion_token_ids: list[int] | None = None


@dataclass
class Reward:
    """The reward of a completion."""

    reward: float | None
    status: Status
    reason: Reason | None
    message: str | None
    components: dict[str, float | None]
    details: Details


@dataclass
class GroupScore:
    """The rewards of a group, in the order of its completions. Equal completions may share one."""

    id: str | None
    policy_version: str
    policy_number: int
    adapter: str | None
    rewards: list[Reward]
    warnings: Sequence[ScoreWarning]
    prompt_token_ids: list[int] | None = None


@dataclass
class ScoreResponse:
    """The answer to a request."""

    request_id: str
    recipe: RecipeRef
    policy: PolicyRef
    groups: list[GroupScore]
