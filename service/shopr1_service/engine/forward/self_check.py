"""The check at load: that the model is causal, and which forward strategy gives its numbers.

Some architectures silently ignore a cache, a mask or positions, some see later tokens, some remember the
longest sequence that they have seen, and some turn into another model at a short one. Hidden states of random
tokens are therefore compared:

1. of sequences with others that continue them, or end in other tokens: earlier states must not change;
2. of a short sequence before and after long ones, and of the longest one by a copy of the model that has
   computed nothing yet: no pass may change the next;
3. of each strategy with independent forwards, for short prompts in all arrangements that requests have, and
   for one prompt that is longer than every window, chunk or choice of keys (`reach.py`).

Passes of the full length are few: two independent ones, one more in 16 bits to measure rounding
(`rounding.py`), and one for each strategy that is right about short prompts. Where RoPE depends on the
length, two more are just longer than its threshold.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.engine.forward.base import (
    Forward,
    IndependentForward,
    PromptGroup,
    Suffix,
)
from shopr1_service.engine.forward.comparison import (
    MAX_SHORT_TOKENS,
    NUM_SHORT_DRAWS,
    NUM_SUFFIX_TOKENS,
    batch_errors,
    beginnings,
    independent_states,
    pass_tolerance,
    short_groups,
    states_at,
)
from shopr1_service.engine.forward.reach import Reach, block_sparse_tokens
from shopr1_service.engine.forward.rounding import (
    SIXTEEN_BITS,
    Tolerance,
    describe,
    relative_errors,
)
from shopr1_service.engine.forward.unused_copy import unused_copy
from shopr1_service.engine.lm_head import UnsupportedModelError
from shopr1_service.engine.rope_scaling import has_length_dependent_rope

logger = logging.getLogger(__name__)

MAX_EAGER_ELEMENTS = 2**29
"""Attention weights of a layer in a pass of eager attention, which allocates all of them."""

_NUM_OTHER_TOKENS = 5
"""Tokens by which one of the two longest sequences is longer."""
_PREFIX_LENGTHS = (2, 7)

Report = Callable[[str], None]


class Cause(StrEnum):
    """Kinds of reasons why a path was not taken."""

    UNSUPPORTED = "unsupported"
    """The path raised an error: it does not support the architecture."""
    DIFFERS = "differs"
    """Its numbers are not the model's."""


@dataclass(frozen=True)
class Rejection:
    """A faster path that was not taken."""

    path: str
    cause: Cause
    detail: str


@dataclass(frozen=True)
class Verdict:
    """The chosen strategy, the faster ones that were rejected, and remarks on the check.

    Attributes:
        feeds_whole: whether a completion must be fed to its end, because later tokens change numbers.
    """

    forward: Forward
    rejected: tuple[Rejection, ...] = ()
    remarks: tuple[str, ...] = ()
    feeds_whole: bool = False


def choose_forward(
    model: PreTrainedModel,
    random_ids: Sequence[int],
    candidates: Sequence[Forward],
    report: Report = lambda _text: None,
    unused: PreTrainedModel | None = None,
) -> Verdict:
    """The first candidate that agrees with independent forwards on these tokens, else these.

    Args:
        random_ids: the longest sequence to check; more than `Reach.num_tokens` where possible.
        report: receives a few words before each long pass.
        unused: an `unused_copy` from before the model's first pass; None: it has not computed anything yet.

    Raises:
        UnsupportedModelError: the model is not causal, remembers earlier sequences, or is changed by them.
    """
    if len(random_ids) <= NUM_SUFFIX_TOKENS:
        return Verdict(IndependentForward(model), remarks=("too few tokens are allowed for a check",))
    check = _SelfCheck(model, random_ids, report, unused or unused_copy(model))
    check.prove_causality()
    verdict = check.choose(candidates)
    for remark in verdict.remarks:
        logger.warning("%s: %s", type(model).__name__, remark)
    return verdict


@dataclass
class _Long:
    """Two long sequences with a common beginning, and their states at all positions.

    Attributes:
        num_common: tokens of the beginning, the prompt.
        states: of both, [T, H].
    """

    rows: tuple[list[int], list[int]]
    num_common: int
    states: tuple[Tensor, Tensor]
    tolerance: Tolerance

    def group(self) -> tuple[PromptGroup, list[Tensor]]:
        """Completions of the common beginning, and their expected states, all of them those of whole rows."""
        suffixes, expected = beginnings(self.rows[0], self.num_common, self.states[0])
        second = self.rows[1][self.num_common :]
        other = Suffix(second, [0, len(second) - 1], len(self.rows[1]))
        prompt_ids = self.rows[0][: self.num_common]
        return (
            PromptGroup(prompt_ids, [*suffixes, other]),
            [*expected, states_at(self.states[1], self.num_common, other)],
        )


@dataclass
class _SelfCheck:
    model: PreTrainedModel
    ids: Sequence[int]
    report: Report
    unused: PreTrainedModel
    remarks: list[str] = field(default_factory=list)
    ties: str = ""

    def __post_init__(self) -> None:
        self._reference = IndependentForward(self.model)
        self._reach = Reach.of(self.model)
        self._is_length_free = not has_length_dependent_rope(self.model)
        self._short = list(self.ids[:MAX_SHORT_TOKENS])
        self._beginnings = dict(self._run_beginnings())  # before any longer sequence
        self._whole_T_H = self._states(self._short)
        self._short_tolerance = pass_tolerance(self.model, self._short, self._whole_T_H, NUM_SHORT_DRAWS)
        self._long: _Long | None = None

    # --- causality ---

    def prove_causality(self) -> None:
        """Compare sequences with their continuations, and each with itself after longer ones.

        Raises:
            UnsupportedModelError: a state depends on tokens after it, or on earlier passes.
        """
        whole_T_H = self._whole_T_H
        if len(self.ids) == len(self._short):
            unused_T_H = independent_states(unused_copy(self.unused), self._short)
            self._refuse_change(whole_T_H, unused_T_H, self._short_tolerance)
        if self._is_length_free:
            for length, states_T_H in self._beginnings.items():
                num_common = min(length, len(whole_T_H))
                self._compare(whole_T_H[:num_common], states_T_H[:num_common], self._short_tolerance)
        num_kept = len(self._short) - _NUM_OTHER_TOKENS
        changed_T_H = self._states(_with_other_end(self._short, num_kept, num_kept + _NUM_OTHER_TOKENS))
        self._compare(changed_T_H[:num_kept], whole_T_H[:num_kept], self._short_tolerance)
        if len(self.ids) > MAX_SHORT_TOKENS:
            self._long = self._long_as_memory_allows()
            self._compare_long(self._long, whole_T_H)
        for length, states_T_H in self._beginnings.items():
            self._refuse_memory(self._beginning(length), states_T_H)

    def _run_beginnings(self) -> Iterator[tuple[int, Tensor]]:
        """Lengths and states of beginnings, one of them just beyond the length from which RoPE changes."""
        lengths = {*_PREFIX_LENGTHS, len(self._short) // 2, len(self._short) - 1}
        if (threshold := self._reach.rope_threshold) is not None:
            lengths.add(min(threshold + NUM_SUFFIX_TOKENS, len(self.ids) - 1))
        for length in sorted(lengths):
            try:
                yield length, self._beginning(length)
            except Exception as error:  # an architecture may need more tokens
                self._remark(f"it fails with {length} tokens: {error!r}")

    def _beginning(self, length: int) -> Tensor:
        if length > MAX_SHORT_TOKENS:
            self.report(f"independent, {length} tokens")
        return self._states(self.ids[:length])

    def _compare(self, actual_T_H: Tensor, expected_T_H: Tensor, tolerance: Tolerance) -> None:
        error_T = relative_errors(actual_T_H, expected_T_H)
        if tolerance.allows(error_T):
            return
        changed = (~(error_T <= tolerance.worst)).nonzero()[:, 0].tolist() or [0]
        num_chosen = self._reach.num_chosen
        if num_chosen is not None and changed[0] >= num_chosen:
            self.ties = (
                f"its choice of {num_chosen} keys for each token breaks ties by the sequence's length: later "
                "tokens change the numbers of earlier ones, and each completion is run whole and alone"
            )
            self._remark(self.ties)
            return
        raise UnsupportedModelError(
            f"{self._name} is not causal: later tokens change the states of {len(changed)} of {len(error_T)} "
            f"tokens before them, from position {changed[0]} on; {describe([error_T], tolerance)}"
            f"{self._hint()}"
        )

    def _hint(self) -> str:
        config = self.model.config.get_text_config()
        hints = [] if getattr(config, "is_decoder", True) else [". Its config has is_decoder = false"]
        if (threshold := block_sparse_tokens(config)) is not None:
            hints.append(
                ". Its config has attention_type = 'block_sparse', which the first sequence of up to "
                f"{threshold} tokens turns into 'original_full' for good: set attention_type to that, or "
                f"max_sequence_tokens to at most {threshold}"
            )
        return "".join(hints)

    def _refuse_memory(self, actual_T_H: Tensor, expected_T_H: Tensor) -> None:
        error_T = relative_errors(actual_T_H, expected_T_H)
        if not self._short_tolerance.allows(error_T):
            raise UnsupportedModelError(
                f"{self._name} remembers earlier sequences: the states of {len(error_T)} tokens change after "
                f"longer ones; {describe([error_T], self._short_tolerance)}"
            )

    def _refuse_change(self, actual_T_H: Tensor, unused_T_H: Tensor, tolerance: Tolerance) -> None:
        """Refuse a model whose states are not those of its copy that had computed nothing before."""
        error_T = relative_errors(actual_T_H, unused_T_H)
        if not tolerance.allows(error_T):
            raise UnsupportedModelError(
                f"{self._name} is changed by the sequences that it computes: after shorter ones the states "
                f"of {len(error_T)} tokens are not those of a freshly loaded model; "
                f"{describe([error_T], tolerance)}{self._hint()}"
            )

    # --- long sequences ---

    def _long_as_memory_allows(self) -> _Long:
        num_tokens = min(len(self.ids), self._most_eager_tokens())
        while True:
            try:
                long = self._make_long(num_tokens)
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_memory(error) or num_tokens <= 2 * MAX_SHORT_TOKENS:
                    raise
            num_tokens //= 2
        if num_tokens < min(len(self.ids), self._reach.num_tokens):
            self._remark(f"checked up to {num_tokens} tokens; its config names {self._reach.num_tokens}")
        return long

    def _most_eager_tokens(self) -> int:
        config = self.model.config.get_text_config()
        if getattr(config, "_attn_implementation", None) != "eager":
            return len(self.ids)
        num_heads = getattr(config, "num_attention_heads", None) or 1
        return max(MAX_SHORT_TOKENS + 1, math.isqrt(MAX_EAGER_ELEMENTS // num_heads))

    def _make_long(self, num_tokens: int) -> _Long:
        num_common = num_tokens - NUM_SUFFIX_TOKENS - _NUM_OTHER_TOKENS
        first = list(self.ids[: num_common + NUM_SUFFIX_TOKENS])
        # Two lengths: what depends on the length of the row shows as a change of earlier states.
        second = _with_other_end(self.ids, num_common, num_tokens if self._is_length_free else len(first))
        unused = unused_copy(self.unused)
        self.report(f"independent, {len(first)} tokens")
        first_T_H = independent_states(unused, first)
        self.report(f"independent, {len(second)} tokens")
        states = (first_T_H, self._states(second))
        if first_T_H.dtype in SIXTEEN_BITS:
            self.report(f"rounding, {len(first)} tokens")
        return _Long((first, second), num_common, states, pass_tolerance(unused, first, first_T_H, 1))

    def _compare_long(self, long: _Long, short_T_H: Tensor) -> None:
        common = slice(0, long.num_common)
        try:
            self._compare(long.states[1][common], long.states[0][common], long.tolerance)
            if self._is_length_free:
                self._compare(long.states[0][: len(short_T_H)], short_T_H, long.tolerance)
        except UnsupportedModelError:  # the first row was computed by the unused copy
            self._refuse_change(self._states(long.rows[0]), long.states[0], long.tolerance)
            raise

    # --- strategies ---

    def choose(self, candidates: Sequence[Forward]) -> Verdict:
        if self.ties:  # agreement of other strategies would be luck
            ties = [Rejection(each.name, Cause.DIFFERS, self.ties) for each in candidates]
            return self._verdict(self._reference, ties)
        groups = short_groups(self._short)
        expected = [self._expected(group) for group in groups]
        rejected: list[Rejection] = []
        for candidate in candidates:
            rejection = self._rejection(candidate, groups, expected)
            if rejection is None:
                return self._verdict(candidate, rejected)
            logger.info("%s with %s: %s", self._name, candidate.name, rejection.detail)
            rejected.append(rejection)
        logger.warning("%s cannot share a prompt: each completion is run with all of it", self._name)
        return self._verdict(self._reference, rejected)

    def _expected(self, group: PromptGroup) -> list[Tensor]:
        """The states of independent forwards. Those of beginnings of the short sequence are known."""
        num_prompt, expected = len(group.prompt_ids), []
        for suffix in group.suffixes:
            row = [*group.prompt_ids, *suffix.ids]
            if self._is_length_free and row == self._short[: len(row)]:
                expected.append(states_at(self._whole_T_H, num_prompt, suffix))
            else:
                expected += self._reference.hidden_states(group.prompt_ids, [suffix])
        return expected

    def _verdict(self, forward: Forward, rejected: Sequence[Rejection] = ()) -> Verdict:
        return Verdict(forward, tuple(rejected), tuple(self.remarks), bool(self.ties))

    def _rejection(
        self, candidate: Forward, groups: Sequence[PromptGroup], expected: Sequence[Sequence[Tensor]]
    ) -> Rejection | None:
        try:
            for errors, tolerance in self._candidate_errors(candidate, groups, expected):
                if not tolerance.allows(torch.cat(errors)):
                    return Rejection(candidate.name, Cause.DIFFERS, describe(errors, tolerance))
        except Exception as error:  # an architecture may raise anything
            return Rejection(candidate.name, Cause.UNSUPPORTED, repr(error))
        return None

    def _candidate_errors(
        self, candidate: Forward, groups: Sequence[PromptGroup], expected: Sequence[Sequence[Tensor]]
    ) -> Iterator[tuple[list[Tensor], Tolerance]]:
        """Errors of groups run one by one, when prompts may be cached, together, and after a long one."""
        alone = [states for group in groups for states in candidate.batch([group])]
        yield batch_errors(alone, expected), self._short_tolerance
        yield batch_errors(candidate.batch(groups), expected), self._short_tolerance
        if self._long is not None:
            group, long_expected = self._long.group()
            self.report(f"{candidate.name}, {len(group.prompt_ids)} tokens")
            yield batch_errors(candidate.batch([group]), [long_expected]), self._long.tolerance
            yield batch_errors(candidate.batch(groups), expected), self._short_tolerance

    # --- passes ---

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)

    def _states(self, ids: Sequence[int]) -> Tensor:
        return independent_states(self.model, ids)


def _with_other_end(ids: Sequence[int], num_kept: int, num_tokens: int) -> list[int]:
    """Tokens that begin like `ids` and differ from the token `num_kept` on."""
    kept = list(ids[:num_kept])
    others = [token_id for token_id in ids if token_id != ids[num_kept]] or [ids[num_kept]]
    num_other = num_tokens - num_kept
    return kept + (others * num_other)[:num_other]


def _is_memory(error: BaseException) -> bool:
    is_typed = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_typed or any(text in str(error) for text in ("not enough memory", "can't allocate memory"))
