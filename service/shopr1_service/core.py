"""What metrics and logs get to see of a scored group.

The scoring core says what happened; who listens is put together in `state.py`. A listener that fails is
logged and costs nobody a reward.
"""

import hashlib
import logging
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from shopr1_client.wire import (
    Group,
    GroupScore,
    Reason,
)
from shopr1_client.wire_policy import VersionDemand, VersionInfo
from shopr1_rewards import Action, Judgement, Recipe, Span
from shopr1_rewards.recipe import SelfCertaintyRecipe


@dataclass(frozen=True)
class Version:
    """A state of the weights.

    Attributes:
        adapter: None for the policy's own weights.
        loaded_at_s: Unix time.
    """

    name: str
    number: int = 0
    adapter: str | None = None
    loaded_at_s: float = 0.0

    @property
    def info(self) -> VersionInfo:
        """As it is shown."""
        return VersionInfo(
            version=self.name, number=self.number, adapter=self.adapter, loaded_at=self.loaded_at_s
        )


@dataclass(frozen=True)
class Target:
    """What a request wants to be scored with.

    Attributes:
        adapter: by name; `base` means none, None means the default.
    """

    adapter: str | None = None
    demand: VersionDemand | None = None


class CodecError(ValueError):
    """Input that the policy's tokenizer cannot take."""


@dataclass(frozen=True)
class Tokens:
    """A text and its tokens; `offsets[i]` are the characters that token i overlaps."""

    text: str
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]

    def overlapping(self, span: Span) -> list[int]:
        """Indices of the tokens that overlap the span, ascending."""
        return [i for i, (start, end) in enumerate(self.offsets) if start < span.end and end > span.start]


@dataclass
class CacheStats:
    """What the cache has done, in tokens, bytes and chunks."""

    num_hit_tokens: int = 0
    num_missed_tokens: int = 0
    num_bytes: int = 0
    num_evicted_chunks: int = 0


@dataclass(frozen=True)
class MeasuredCompletion:
    """A completion and the tokens that are to be measured.

    Attributes:
        ids: all its token ids.
        measured: indices into `ids`, ascending, at least one.
    """

    ids: Sequence[int]
    measured: Sequence[int]


@dataclass(frozen=True)
class PromptScope:
    """Everything but the token ids that the keys and values of a prompt depend on.

    Attributes:
        weights: in the queue the request's target; in the engine the adapter's version, None for the policy's
            own weights.
        inputs_digest: digest of inputs that are not tokens, such as images; empty if there are none.
    """

    weights: Target | Version | None = None
    inputs_digest: bytes = b""


TEXT_SCOPE = PromptScope()
"""The scope of tokens alone, with the policy's own weights."""


@dataclass(frozen=True, eq=False)
class PromptKey:
    """The identity of a prompt. Only equal prompts share a batch and a place in the prefix cache."""

    ids: Sequence[int]
    scope: PromptScope = TEXT_SCOPE

    def with_weights(self, weights: Target | Version | None) -> "PromptKey":
        return PromptKey(self.ids, replace(self.scope, weights=weights))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptKey) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @cached_property
    def _identity(self) -> tuple[bytes, PromptScope]:
        # A digest: prompts of 32k tokens are slow to compare and to hash again and again.
        return hashlib.blake2b(array("q", self.ids).tobytes()).digest(), self.scope


@dataclass(frozen=True)
class TokenGroup:
    """A prompt and its completions."""

    prompt: PromptKey
    completions: Sequence[MeasuredCompletion]

    @property
    def prompt_ids(self) -> Sequence[int]:
        return self.prompt.ids

    @property
    def num_own_tokens(self) -> int:
        """Tokens of the completions: the cost of the group where its prompt is computed anyway."""
        return sum(len(completion.ids) for completion in self.completions)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.ids) + self.num_own_tokens

    def with_weights(self, weights: Target | Version | None) -> "TokenGroup":
        return TokenGroup(self.prompt.with_weights(weights), self.completions)


@dataclass(frozen=True)
class Certainty:
    """The recipe's divergence at each measured token, in nats (eq3: nats / V)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)


@dataclass(frozen=True)
class Unmeasurable:
    """Why there is no certainty."""

    reason: Reason
    message: str


Measured = list[Certainty | Unmeasurable]
"""Of one group, in the order of its completions."""


class FatalEngineError(Exception):
    """The device is gone, as after an illegal memory access: the process must end."""


@dataclass
class EngineStats:
    """What an engine has done since it was made."""

    cache: CacheStats = field(default_factory=CacheStats)
    num_out_of_memory: int = 0


@dataclass(frozen=True)
class Measurements:
    """Of a group's completions, in order, and the version of the policy that they are of."""

    values: Sequence[Certainty | Unmeasurable]
    version: Version


@dataclass(eq=False)
class Progress:
    """How far the work of one call is.

    Attributes:
        num_waiting: groups that wait for the engine; None before they are admitted.
    """

    num_waiting: int | None = None

    @property
    def has_begun(self) -> bool:
        """Whether all of it is being measured or done: to stop it now would save nothing."""
        return self.num_waiting == 0


@dataclass(frozen=True)
class Kind:
    """What jobs must have in common to be measured in one pass.

    Attributes:
        target: which version of the policy is to measure; the engine finds it when it begins.
    """

    rules: SelfCertaintyRecipe
    target: Target = field(default_factory=Target)


_NO_TOKENS = Tokens("", (), ())


@dataclass(frozen=True)
class PreparedRollout:
    """A completion after the rules.

    Attributes:
        tokens: the completion's tokens, where they were needed.
        measured: indices of the tokens to be measured; empty where self-certainty is not wanted.
    """

    judgement: Judgement
    tokens: Tokens
    measured: Sequence[int]


@dataclass(frozen=True)
class PreparedGroup:
    """A group after the rules. `truth` is what the human did."""

    id: str | None
    truth: Action
    prompt_ids: Sequence[int]
    rollouts: Sequence[PreparedRollout]

    def token_group(self) -> TokenGroup:
        """What the engine is to measure: the rollouts that have something to measure, in order."""
        return TokenGroup(
            PromptKey(self.prompt_ids),
            [MeasuredCompletion(r.tokens.ids, r.measured) for r in self.rollouts if r.measured],
        )


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Who asks.

    Attributes:
        request_id: as it stands in answer and logs.
        run: the training run that the request belongs to; empty if it named none.
    """

    request_id: str
    run: str = ""


@dataclass(frozen=True)
class ScoredGroup:
    """A group, as it was sent, as it was understood, and what it earned."""

    origin: Origin
    recipe: Recipe
    group: Group
    prepared: PreparedGroup
    score: GroupScore


Observer = Callable[[ScoredGroup], None]


def tell(observers: Iterable[Observer], scored: ScoredGroup) -> None:
    """Show a group to all who listen."""
    for observer in observers:
        try:
            observer(scored)
        except Exception:  # the reward is right, whatever a log does with it
            logger.exception("request %s: a listener failed", scored.origin.request_id)
