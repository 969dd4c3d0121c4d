"""Separate completions by the length of their sequence, where RoPE depends on it.

A prompt's keys are rotated by the frequencies of the whole sequence, so completions share them only where
prompt and completion together have the same frequencies. Each set of frequencies has keys of its own in the
prefix cache. Where a set belongs to one length alone (dynamic scaling, beyond the model's limit) its keys
are not kept: no later prompt would use them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from shopr1_service.engine.forward.base import Forward, PromptGroup, Suffix
from shopr1_service.engine.rope_scaling import LengthDependentRope


class ByLengthForward:
    """A forward strategy that runs the completions of one set of frequencies at a time."""

    def __init__(self, forward: Forward, rope: LengthDependentRope) -> None:
        self.name = forward.name
        self._forward = forward
        self._rope = rope

    @property
    def attention(self) -> str:
        return self._forward.attention

    def hidden_states(self, prompt_ids: Sequence[int], suffixes: Sequence[Suffix]) -> list[Tensor]:
        return self.batch([PromptGroup(prompt_ids, suffixes)])[0]

    def batch(self, groups: Sequence[PromptGroup]) -> list[list[Tensor]]:
        lengths = [[self._length(group, suffix) for suffix in group.suffixes] for group in groups]
        distinct = dict.fromkeys(length for own in lengths for length in own)
        states = {length: self._run(groups, lengths, length) for length in distinct}
        return [[next(states[length][i]) for length in own] for i, own in enumerate(lengths)]

    def _length(self, group: PromptGroup, suffix: Suffix) -> int:
        num_tokens = suffix.num_rope_tokens or len(group.prompt_ids) + len(suffix.ids)
        return self._rope.representative(num_tokens)

    def _run(
        self, groups: Sequence[PromptGroup], lengths: Sequence[Sequence[int]], length: int
    ) -> list[Iterator[Tensor]]:
        """The hidden states of the suffixes of one length, in order, for each group."""
        is_shared = self._rope.is_shared(length)
        parts = [
            replace(
                group,
                suffixes=[suffix for suffix, its in zip(group.suffixes, own, strict=True) if its == length],
                scope=replace(group.scope, num_rope_tokens=length),
                is_kept=is_shared,
            )
            for group, own in zip(groups, lengths, strict=True)
        ]
        with self._rope.pinned(length):
            states = iter(self._forward.batch([part for part in parts if part.suffixes]))
        return [iter(next(states) if part.suffixes else ()) for part in parts]
