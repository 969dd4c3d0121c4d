"""The engine: token groups in, self-certainties out. Knows tensors and ids; no text, no rules, no HTTP."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shopr1_client.wire import Reason
from shopr1_rewards.recipe import Position, SelfCertaintyRecipe, Vocabulary
from shopr1_rewards.self_certainty import Head, divergences
from shopr1_service.forward import Forward, Suffix

logger = logging.getLogger(__name__)


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
class TokenGroup:
    """A prompt and completions of it."""

    prompt_ids: Sequence[int]
    completions: Sequence[MeasuredCompletion]


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


class Engine:
    """Measures groups with a model's forward and head."""

    def __init__(
        self, forward: Forward, head: Head, *, max_sequence_tokens: int, num_tokenizer_tokens: int
    ) -> None:
        self._forward = forward
        self._head = head
        self._max_sequence_tokens = max_sequence_tokens
        self._num_vocab = {
            Vocabulary.HEAD: head.num_rows,
            Vocabulary.TOKENIZER: min(num_tokenizer_tokens, head.num_rows),
        }

    def certainties(self, group: TokenGroup, rules: SelfCertaintyRecipe) -> list[Certainty | Unmeasurable]:
        """Measure a group's completions, in order. A failed one does not touch the others' values."""
        shift = 0 if rules.position is Position.SHIFTED else -1
        suffixes = [_suffix(completion, shift) for completion in group.completions]
        obstacles = [self._obstacle(len(group.prompt_ids), suffix) for suffix in suffixes]
        feasible = [suffix for suffix, obstacle in zip(suffixes, obstacles, strict=True) if obstacle is None]
        distinct = list(dict.fromkeys(feasible))  # identical completions are computed once
        measured = self._measure(group.prompt_ids, distinct, rules)
        by_suffix = dict(zip(distinct, measured, strict=True))
        return [obstacle or by_suffix[suffix] for suffix, obstacle in zip(suffixes, obstacles, strict=True)]

    def _obstacle(self, num_prompt_tokens: int, suffix: Suffix) -> Unmeasurable | None:
        if suffix.positions[0] + num_prompt_tokens < 0:
            return Unmeasurable(Reason.NO_CONTEXT, "nothing precedes the first measured token")
        num_tokens = num_prompt_tokens + len(suffix.ids)
        if num_tokens > self._max_sequence_tokens:
            message = f"{num_tokens} tokens are needed, the policy takes {self._max_sequence_tokens}"
            return Unmeasurable(Reason.SEQUENCE_TOO_LONG, message)
        return None

    def _measure(
        self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix], rules: SelfCertaintyRecipe
    ) -> list[Certainty | Unmeasurable]:
        if not suffixes:
            return []
        try:
            hidden = self._forward.hidden_states(prompt_ids, suffixes)
            return self._reduce(hidden, rules)
        except Exception as error:  # a failed group is data; the next one must still be served
            logger.exception("a forward of %d prompt tokens failed", len(prompt_ids))
            return [Unmeasurable(Reason.ENGINE_FAILURE, type(error).__name__)] * len(suffixes)

    @torch.inference_mode()
    def _reduce(self, hidden: list[Tensor], rules: SelfCertaintyRecipe) -> list[Certainty | Unmeasurable]:
        values_T = divergences(
            torch.cat(hidden),
            self._head,
            temperature=rules.temperature,
            num_vocab=self._num_vocab[rules.vocabulary],
        ).select(rules.divergence)
        return [_certainty(part_T) for part_T in torch.split(values_T, [len(rows) for rows in hidden])]


def _suffix(completion: MeasuredCompletion, shift: int) -> Suffix:
    """What must be fed so that each measured token's distribution is known, and not a token more."""
    positions = tuple(index + shift for index in completion.measured)
    return Suffix(ids=tuple(completion.ids[: positions[-1] + 1]), positions=positions)


def _certainty(values_T: Tensor) -> Certainty | Unmeasurable:
    if not bool(torch.isfinite(values_T).all()):
        return Unmeasurable(Reason.NON_FINITE_LOGITS, "the policy's logits are not finite")
    return Certainty(tuple(values_T.tolist()))
