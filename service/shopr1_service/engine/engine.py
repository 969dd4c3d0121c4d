"""The engine computes the self-certainty of token groups. Knows ids and tensors; no text, no HTTP."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shopr1_client.wire import Reason
from shopr1_rewards.recipe import Position, SelfCertaintyRecipe, Vocabulary
from shopr1_rewards.self_certainty import Head, divergences
from shopr1_service.core import (
    Certainties,
    Certainty,
    CompletionTokens,
    EngineStats,
    FatalEngineError,
    TokenGroup,
    Unmeasurable,
)
from shopr1_service.engine.forward.base import Forward, PromptGroup, Suffix
from shopr1_service.engine.rope_scaling import LengthDependentRope

logger = logging.getLogger(__name__)


class Engine:
    """Computes self-certainty with a forward strategy and a head.

    Args:
        max_sequence_tokens: longest prompt with completion.
        num_tokenizer_tokens: vocabulary size for recipes that count the tokenizer's tokens only.
        release_memory: frees caches; called before a failed batch is retried.
        rope: the policy's RoPE, if its frequencies depend on the sequence's length.
        feeds_whole: feed completions to their end, where tokens after the last measured one change numbers.
    """

    def __init__(
        self,
        forward: Forward,
        head: Head,
        *,
        max_sequence_tokens: int,
        num_tokenizer_tokens: int,
        release_memory: Callable[[], None] = lambda: None,
        stats: EngineStats | None = None,
        rope: LengthDependentRope | None = None,
        feeds_whole: bool = False,
    ) -> None:
        self.stats = stats or EngineStats()
        self._forward = forward
        self._head = head
        self._max_sequence_tokens = max_sequence_tokens
        self._release_memory = release_memory
        self._rope = rope
        self._feeds_whole = feeds_whole
        self._num_vocab = {
            Vocabulary.HEAD: head.num_rows,
            Vocabulary.TOKENIZER: min(num_tokenizer_tokens, head.num_rows),
        }

    def certainties(self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe) -> list[Certainties]:
        """Score the completions of several groups together. A failed completion does not affect the others.

        Returns:
            For each group, a result for each of its completions, in order.

        Raises:
            FatalEngineError: the device is unusable.
        """
        shift = 0 if rules.position is Position.SHIFTED else -1
        suffixes = [[self._suffix(group, each, shift) for each in group.completions] for group in groups]
        obstacles = [
            [self._obstacle(len(group.prompt_ids), suffix) for suffix in own]
            for group, own in zip(groups, suffixes, strict=True)
        ]
        # Identical completions are computed once.
        feasible = [
            dict.fromkeys(suffix for suffix, obstacle in zip(own, blocked, strict=True) if obstacle is None)
            for own, blocked in zip(suffixes, obstacles, strict=True)
        ]
        batch = [
            PromptGroup(group.prompt.ids, list(f), group.prompt.scope)
            for group, f in zip(groups, feasible, strict=True)
        ]
        measured = iter(self._measure([group for group in batch if group.suffixes], rules))
        by_suffix = [dict(zip(f, next(measured), strict=True)) if f else {} for f in feasible]
        return [
            [obstacle or known[suffix] for suffix, obstacle in zip(own, blocked, strict=True)]
            for own, blocked, known in zip(suffixes, obstacles, by_suffix, strict=True)
        ]

    def _suffix(self, group: TokenGroup, completion: CompletionTokens, shift: int) -> Suffix:
        """The shortest input from which the distribution at each measured token is known."""
        positions = tuple(index + shift for index in completion.measured)
        ids = tuple(completion.ids if self._feeds_whole else completion.ids[: positions[-1] + 1])
        if self._rope is None:
            return Suffix(ids, positions)
        num_tokens = len(group.prompt_ids) + len(completion.ids)
        return Suffix(ids, positions, self._rope.representative(num_tokens))

    def _obstacle(self, num_prompt_tokens: int, suffix: Suffix) -> Unmeasurable | None:
        if suffix.positions[0] + num_prompt_tokens < 0:
            return Unmeasurable(Reason.NO_CONTEXT, "nothing precedes the first measured token")
        num_tokens = num_prompt_tokens + len(suffix.ids)
        if num_tokens > self._max_sequence_tokens:
            message = f"{num_tokens} tokens are needed, the policy takes {self._max_sequence_tokens}"
            return Unmeasurable(Reason.SEQUENCE_TOO_LONG, message)
        return None

    def _measure(self, batch: Sequence[PromptGroup], rules: SelfCertaintyRecipe) -> list[Certainties]:
        """Score all groups together; if that fails, retry once in smaller parts."""
        if not batch:
            return []
        try:
            return self._attempt(batch, rules)
        except Exception as error:  # a failed group is a result; the next one must still be served
            parts = self._parts_to_retry(batch, error)
            if not parts:
                return [_failed(group, error) for group in batch]
        # The error is out of scope, and its traceback no longer holds the tensors that took the memory.
        self._release_memory()
        measured = [self._measure_part(part, rules) for part in parts]
        return measured if len(batch) > 1 else [[each for part in measured for each in part]]

    def _measure_part(self, part: PromptGroup, rules: SelfCertaintyRecipe) -> Certainties:
        try:
            return self._attempt([part], rules)[0]
        except Exception as error:
            self._record(error, [part])
            return _failed(part, error)

    def _parts_to_retry(self, batch: Sequence[PromptGroup], error: Exception) -> list[PromptGroup]:
        """The groups one by one; a single group in halves if memory ran out, else nothing."""
        self._record(error, batch)
        if len(batch) > 1:
            return list(batch)
        return _halves(batch[0]) if is_out_of_memory(error) else []

    def _record(self, error: Exception, batch: Sequence[PromptGroup]) -> None:
        if isinstance(error, torch.AcceleratorError):
            raise FatalEngineError(str(error)) from error
        self.stats.num_out_of_memory += is_out_of_memory(error)
        num_tokens = sum(len(group.prompt_ids) for group in batch)
        logger.error("a forward of %d prompts with %d tokens failed", len(batch), num_tokens, exc_info=error)

    @torch.inference_mode()
    def _attempt(self, batch: Sequence[PromptGroup], rules: SelfCertaintyRecipe) -> list[Certainties]:
        hidden = self._forward.batch(batch)
        values_T = divergences(
            torch.cat([states for group in hidden for states in group]),
            self._head,
            rules.divergence,
            temperature=rules.temperature,
            num_vocab=self._num_vocab[rules.vocabulary],
        )
        parts = iter(torch.split(values_T, [len(states) for group in hidden for states in group]))
        return [[_certainty(next(parts)) for _ in group] for group in hidden]


def _halves(group: PromptGroup) -> list[PromptGroup]:
    """Halves of a group. A group of one completion is retried whole: memory may have become free."""
    middle = (len(group.suffixes) + 1) // 2
    halves = (group.suffixes[:middle], group.suffixes[middle:])
    return [replace(group, suffixes=half) for half in halves if half]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may succeed."""
    # PyTorch has no exception class for a CPU's memory.
    is_cpu = "DefaultCPUAllocator" in str(error)
    return is_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _failed(group: PromptGroup, error: Exception) -> Certainties:
    reason = Reason.OUT_OF_MEMORY if is_out_of_memory(error) else Reason.ENGINE_FAILURE
    return [Unmeasurable(reason, type(error).__name__)] * len(group.suffixes)


def _certainty(values_T: Tensor) -> Certainty | Unmeasurable:
    if not bool(torch.isfinite(values_T).all()):
        return Unmeasurable(Reason.NON_FINITE_LOGITS, "the policy's logits are not finite")
    return Certainty(tuple(values_T.tolist()))
