"""Data types that several packages share. Knows no torch, no HTTP, no settings."""

import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from shopr1_client.wire import Group, Reason
from shopr1_client.wire_policy import VersionDemand, VersionInfo
from shopr1_client.wire_prompt import ScoreWarning
from shopr1_rewards import Action, Judgement, Recipe, Span
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.answers import GroupScore, ScoreResponse


@dataclass(frozen=True)
class Version:
    """A state of the weights.

    Attributes:
        adapter: None for the policy's own weights.
        loaded_at_s: Unix time; not compared, since each engine loads the same version at its own time.
    """

    name: str
    number: int = 0
    adapter: str | None = None
    loaded_at_s: float = field(default=0.0, compare=False)

    @property
    def info(self) -> VersionInfo:
        """The version, as responses show it."""
        return VersionInfo(
            version=self.name, number=self.number, adapter=self.adapter, loaded_at=self.loaded_at_s
        )


@dataclass(frozen=True)
class Target:
    """The weights that a request asks for.

    Attributes:
        adapter: its name; `base` means none, None means the default adapter.
        demand: None: the newest version.
    """

    adapter: str | None = None
    demand: VersionDemand | None = None


class CodecError(ValueError):
    """Input that the policy's tokenizer cannot encode."""


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
    """Counters of the prefix cache, in tokens, bytes and chunks."""

    num_hit_tokens: int = 0
    num_missed_tokens: int = 0
    num_bytes: int = 0
    num_evicted_chunks: int = 0


@dataclass(frozen=True)
class CompletionTokens:
    """A completion, and the tokens whose self-certainty is computed.

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
        num_rope_tokens: a length of the sequences by whose RoPE frequencies the keys are rotated; None where
            frequencies are static. Set by the engine.
    """

    weights: Target | Version | None = None
    inputs_digest: bytes = b""
    num_rope_tokens: int | None = None


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
    completions: Sequence[CompletionTokens]

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
    """Self-certainty: the recipe's divergence at each measured token, in nats (eq3: nats / V)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)


@dataclass(frozen=True)
class Unmeasurable:
    """The reason why a completion has no self-certainty."""

    reason: Reason
    message: str


Certainties = list[Certainty | Unmeasurable]
"""Results of one group, in the order of its completions."""


class FatalEngineError(Exception):
    """The device is unusable, as after an illegal memory access: the process must end."""


@dataclass
class EngineStats:
    """Counters of an engine since it was created."""

    cache: CacheStats = field(default_factory=CacheStats)
    num_out_of_memory: int = 0


@dataclass(frozen=True)
class GroupCertainties:
    """Results of a group, in the order of its completions, and the version that computed them."""

    values: Sequence[Certainty | Unmeasurable]
    version: Version


@dataclass(eq=False)
class Progress:
    """Progress of one call of the engine.

    Attributes:
        num_waiting: groups in the queue; None before they are queued.
    """

    num_waiting: int | None = None

    @property
    def has_started(self) -> bool:
        """Whether no group is queued any more: to cancel the call now would save nothing."""
        return self.num_waiting == 0


@dataclass(frozen=True)
class BatchKey:
    """Rules and weights of a computation: groups with equal keys can share a batch.

    Attributes:
        target: resolved to a version when the batch starts.
    """

    rules: SelfCertaintyRecipe
    target: Target = field(default_factory=Target)


class PreparedRollout(NamedTuple):
    """A completion that has been judged and tokenised.

    Attributes:
        tokens: empty where they are not needed.
        measured: indices of the tokens whose self-certainty is computed; empty if it is not.
        unknown_end: the special token at its end that alone makes its format invalid, or None.
    """

    judgement: Judgement
    tokens: Tokens
    measured: Sequence[int]
    unknown_end: str | None = None


@dataclass(frozen=True)
class PreparedGroup:
    """A group that has been judged and tokenised. `truth` is the human's action."""

    id: str | None
    truth: Action
    prompt_ids: Sequence[int]
    rollouts: Sequence[PreparedRollout]
    warnings: Sequence[ScoreWarning] = ()

    def token_group(self) -> TokenGroup:
        """The engine's input: the rollouts with measured tokens, in order."""
        return TokenGroup(
            PromptKey(self.prompt_ids),
            [CompletionTokens(r.tokens.ids, r.measured) for r in self.rollouts if r.measured],
        )


@dataclass(frozen=True)
class Origin:
    """The origin of a request.

    Attributes:
        request_id: as in the response and the logs.
        run: the training run that the request belongs to; empty if it names none.
    """

    request_id: str
    run: str = ""


class RolloutFacts(NamedTuple):
    """Facts about a scored completion that its reward does not have.

    Attributes:
        repetition_ratio: `repetition_ratio` of its measured tokens.
        unknown_end: the special token at its end that alone makes its format invalid, or None.
        decoded: its text, if it was sent as token ids.
    """

    repetition_ratio: float = 0.0
    unknown_end: str | None = None
    decoded: str | None = None


@dataclass(frozen=True)
class GroupFacts:
    """Facts about a scored group that its score does not have. `truth` is the human's action."""

    truth: Action
    rollouts: Sequence[RolloutFacts]


@dataclass(frozen=True)
class ScoredRequest:
    """A response, and the facts that observers get with it. Without prompts and tokens: some are kept."""

    response: ScoreResponse
    recipe: Recipe
    facts: Sequence[GroupFacts]


@dataclass(frozen=True)
class ScoredGroup:
    """A group as it was sent, and its score. `index` is its number in the request."""

    origin: Origin
    recipe: Recipe
    group: Group
    facts: GroupFacts
    score: GroupScore
    index: int = 0


Observer = Callable[[ScoredGroup], None]
"""Called with each scored group; an error is logged and does not affect the response."""
