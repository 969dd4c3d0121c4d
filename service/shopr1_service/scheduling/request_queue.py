"""The queue of the engine: its order, and the groups that are computed together.

Order. First come, first served, but a short group may overtake a long one. The rank of a group is its time of
arrival plus the time that the engine will take for it; the lowest rank is next. So a long prompt lets shorter
ones pass only for as long as it takes itself, and no group waits forever.

Batches. Groups with the same prompt and rules are merged: trainers that send one rollout per request send
them in bursts, and the prompt is computed once. Short prompts are taken several at a time, up to
`MAX_BATCH_TOKENS`: alone they would not fill the device.

A plain data structure; `Scheduler` guards it by a lock.
"""

from bisect import insort
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, GroupCertainties, Progress, TokenGroup, Unmeasurable, Version
from shopr1_service.monitoring.spans import EnginePass

MAX_BATCH_TOKENS = 4096
"""Upper limit for the tokens of several prompts in a batch: enough to fill a device, and little enough that
the first result does not wait long for the last."""


@dataclass(eq=False)
class QueuedGroup:
    """A group, and the future of its self-certainties.

    Attributes:
        group: its prompt's weights are the target of the request.
        rank_s: on the clock of `time.perf_counter`.
        progress: of the call that the group belongs to.
        engine_pass: the pass that computes the group, once it has started.
    """

    group: TokenGroup
    rules: SelfCertaintyRecipe
    submitted_s: float
    rank_s: float
    progress: Progress = field(default_factory=Progress)
    future: Future[GroupCertainties] = field(default_factory=Future)
    engine_pass: EnginePass | None = None

    @property
    def key(self) -> Hashable:
        """Equal for groups that share a prompt batch."""
        return self.group.prompt, self.rules

    @property
    def batch_key(self) -> Hashable:
        """Equal for groups that share a batch: it has one version of the policy and one set of rules."""
        return self.group.prompt.scope.weights, self.rules

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.group.prompt.ids)

    def start(self) -> bool:
        """Make it impossible to cancel the group; False if it has been cancelled."""
        is_wanted = self.future.set_running_or_notify_cancel()
        if is_wanted and self.progress.num_waiting is not None:
            self.progress.num_waiting -= 1
        return is_wanted


PromptBatch = list[QueuedGroup]
"""Groups with the same prompt and rules, by rank; never empty."""
Batch = list[PromptBatch]
"""Prompt batches that are computed together; never empty, all with the same key."""


class RequestQueue:
    """Queued groups by prompt.

    Args:
        merges: whether groups are computed together. If not, each is a batch of its own, and the other queued
            groups have no influence on its numbers.
    """

    def __init__(self, *, merges: bool = True) -> None:
        self.num_tokens = 0
        """Queued tokens. A prompt that several groups share counts once."""
        self._merges = merges
        self._batches: dict[Hashable, PromptBatch] = {}

    def __bool__(self) -> bool:
        return bool(self._batches)

    def __iter__(self) -> Iterator[QueuedGroup]:
        return (queued for batch in self._batches.values() for queued in batch)

    def num_added_tokens(self, groups: Sequence[QueuedGroup]) -> int:
        """The increase of `num_tokens` if these groups were added."""
        prompts = {each.key: each.num_prompt_tokens for each in groups if each.key not in self._batches}
        return sum(prompts.values()) + sum(each.group.num_own_tokens for each in groups)

    def add(self, groups: Sequence[QueuedGroup]) -> None:
        self.num_tokens += self.num_added_tokens(groups)
        for each in groups:
            insort(self._batches.setdefault(each.key, []), each, key=lambda queued: queued.rank_s)

    def discard(self, groups: Sequence[QueuedGroup]) -> None:
        """Remove those that are still queued."""
        gone = set(groups)
        for key in {each.key for each in groups}:
            removed = [queued for queued in self._batches.get(key, ()) if queued in gone]
            if removed:
                self._remove(removed)

    def take(self) -> Batch:
        """Remove the group with the lowest rank, and those that are computed together with it."""
        first, *others = sorted(self._batches.values(), key=lambda batch: batch[0].rank_s)
        taken = self._take(first, MAX_BATCH_TOKENS)
        batch, num_free = [taken], MAX_BATCH_TOKENS - _num_tokens(taken)
        for other in others if self._merges else ():
            head = other[0]
            if head.batch_key == taken[0].batch_key and head.group.num_tokens <= num_free:
                batch.append(self._take(other, num_free - head.num_prompt_tokens))
                num_free -= _num_tokens(batch[-1])
        return batch

    def _take(self, batch: PromptBatch, max_own_tokens: int) -> PromptBatch:
        """Remove groups from the front of a prompt batch: at least one, and as many as fit."""
        taken: PromptBatch = []
        num_own_tokens = 0
        for queued in batch:
            num_own_tokens += queued.group.num_own_tokens
            if taken and (num_own_tokens > max_own_tokens or not self._merges):
                break
            taken.append(queued)
        self._remove(taken)
        return taken

    def _remove(self, removed: PromptBatch) -> None:
        key = removed[0].key
        gone = set(removed)
        rest = [queued for queued in self._batches[key] if queued not in gone]
        self.num_tokens -= sum(queued.group.num_own_tokens for queued in removed)
        if rest:
            self._batches[key] = rest
        else:
            self.num_tokens -= removed[0].num_prompt_tokens
            del self._batches[key]


def _num_tokens(batch: PromptBatch) -> int:
    return batch[0].num_prompt_tokens + sum(queued.group.num_own_tokens for queued in batch)


def merge(batch: PromptBatch) -> TokenGroup:
    """A group of all completions, behind the prompt that they share."""
    completions = [completion for queued in batch for completion in queued.group.completions]
    return TokenGroup(batch[0].group.prompt, completions)


def distribute(batch: PromptBatch, certainties: Sequence[Certainty | Unmeasurable], version: Version) -> None:
    """Give each group the self-certainties of its own completions."""
    start = 0
    for queued in batch:
        end = start + len(queued.group.completions)
        queued.future.set_result(GroupCertainties(certainties[start:end], version))
        start = end


def reject(batch: Batch, error: Exception) -> None:
    """Set the error for each group."""
    for queued in (queued for prompt_batch in batch for queued in prompt_batch):
        queued.future.set_exception(error)
