"""What waits for the engine: in which order it is taken, and what is taken together.

Order. First come, first served, but a short group may overtake a long one. A job's rank is the time of its
arrival plus the time that the engine will take for it; the lowest rank is next. So a long prompt lets shorter
ones pass only as long as it takes itself: it keeps nobody waiting, and nobody keeps it waiting for ever.

Together. Jobs with the same prompt, rules and target are one lane: trainers that send one rollout per
request send them in bursts, and the prompt is computed once. Short prompts are taken several at a time, up to
`MAX_BATCH_TOKENS`: alone they would not fill the device.

A plain data structure; `scheduler.py` guards it.

From jobs with the same prompt to what the engine measures, and from its measurements to each job's own.
"""

import hashlib
from array import array
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property

from shopr1_service.core import (
    Certainty,
    Kind,
    Measurements,
    Progress,
    TokenGroup,
    Unmeasurable,
    Version,
)
from shopr1_service.monitoring.spans import EnginePass

MAX_BATCH_TOKENS = 4096
"""Tokens that are taken together where there is a choice. Enough to fill a device; the first should not wait
long for the last."""


@dataclass(eq=False)
class Job:
    """A group that somebody waits for.

    Attributes:
        progress: of the call that it belongs to.
        rank_s: when it is due, on the clock of `time.perf_counter`.
        visit: to the engine, once it has begun.
    """

    group: TokenGroup
    kind: Kind
    submitted_s: float
    rank_s: float
    progress: Progress = field(default_factory=Progress)
    future: Future[Measurements] = field(default_factory=Future)
    visit: EnginePass | None = None

    @cached_property
    def lane(self) -> Hashable:
        """Equal for jobs with the same prompt that are of the same kind."""
        # A digest: prompts of 32k tokens are slow to compare and to hash again and again.
        ids = array("q", self.group.prompt_ids)
        return hashlib.blake2b(ids.tobytes()).digest(), self.kind

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.group.prompt_ids)

    @property
    def num_own_tokens(self) -> int:
        """Tokens of its completions: what it costs where its prompt is computed anyway."""
        return sum(len(completion.ids) for completion in self.group.completions)


@dataclass
class _PromptBatch:
    """Jobs that share a lane, in the order of their ranks."""

    jobs: list[Job] = field(default_factory=list)

    @property
    def rank_s(self) -> float:
        return self.jobs[0].rank_s


Batch = list[list[Job]]
"""Jobs to be measured together, by prompt; never empty, all of the same kind."""


class RequestQueue:
    """See the module.

    Args:
        joins: whether jobs are taken together. If not, each is a batch of its own: what else waits has no
            influence on how a job is computed.
    """

    def __init__(self, *, joins: bool = True) -> None:
        self.num_tokens = 0
        """What waits; a prompt that several jobs share counts once."""
        self._joins = joins
        self._lanes: dict[Hashable, _PromptBatch] = {}

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def __iter__(self) -> Iterator[Job]:
        return (job for lane in self._lanes.values() for job in lane.jobs)

    def num_added_tokens(self, jobs: Sequence[Job]) -> int:
        """By how much these jobs would increase `num_tokens`."""
        prompts = {job.lane: job.num_prompt_tokens for job in jobs if job.lane not in self._lanes}
        num_prompt_tokens = sum(prompts.values())
        return num_prompt_tokens + sum(job.num_own_tokens for job in jobs)

    def add(self, jobs: Sequence[Job]) -> None:
        self.num_tokens += self.num_added_tokens(jobs)
        for job in jobs:
            lane = self._lanes.setdefault(job.lane, _PromptBatch())
            lane.jobs.append(job)
            lane.jobs.sort(key=lambda job: job.rank_s)

    def discard(self, job: Job) -> None:
        """Forget a job, if it still waits."""
        lane = self._lanes.get(job.lane)
        if lane is not None and job in lane.jobs:
            self._remove(lane, [job])

    def take(self) -> Batch:
        """The job whose rank is lowest, with those that are computed together with it."""
        first, *others = sorted(self._lanes.values(), key=lambda lane: lane.rank_s)
        jobs = self._take(first, MAX_BATCH_TOKENS)
        batch, num_free = [jobs], MAX_BATCH_TOKENS - _num_tokens(jobs)
        for lane in others if self._joins else ():
            if lane.jobs[0].kind != jobs[0].kind:
                continue
            if lane.jobs[0].num_prompt_tokens + lane.jobs[0].num_own_tokens <= num_free:
                joined = self._take(lane, num_free - lane.jobs[0].num_prompt_tokens)
                batch.append(joined)
                num_free -= _num_tokens(joined)
        return batch

    def _take(self, lane: _PromptBatch, max_own_tokens: int) -> list[Job]:
        """Jobs from the front of a lane: one at least, else what fits."""
        taken: list[Job] = []
        num_own_tokens = 0
        for job in lane.jobs:
            num_own_tokens += job.num_own_tokens
            if taken and (num_own_tokens > max_own_tokens or not self._joins):
                break
            taken.append(job)
        self._remove(lane, taken)
        return taken

    def _remove(self, lane: _PromptBatch, jobs: Sequence[Job]) -> None:
        lane.jobs = [job for job in lane.jobs if job not in jobs]
        self.num_tokens -= sum(job.num_own_tokens for job in jobs)
        if not lane.jobs:
            self.num_tokens -= jobs[0].num_prompt_tokens
            del self._lanes[jobs[0].lane]


def _num_tokens(jobs: Sequence[Job]) -> int:
    return jobs[0].num_prompt_tokens + sum(job.num_own_tokens for job in jobs)


def begins(job: Job) -> bool:
    """Whether somebody still waits for it; from here on it cannot be cancelled."""
    begins = job.future.set_running_or_notify_cancel()
    if begins and job.progress.num_waiting is not None:
        job.progress.num_waiting -= 1
    return begins


def joined(lane: Sequence[Job]) -> TokenGroup:
    """The completions of all, behind the prompt that they share."""
    completions = [completion for job in lane for completion in job.group.completions]
    return TokenGroup(lane[0].group.prompt_ids, completions)


def num_tokens(group: TokenGroup) -> int:
    """What the engine is given."""
    return len(group.prompt_ids) + sum(len(completion.ids) for completion in group.completions)


def deal(lane: Sequence[Job], certainties: Sequence[Certainty | Unmeasurable], version: Version) -> None:
    """Give each job the measurements of its own completions."""
    start = 0
    for job in lane:
        end = start + len(job.group.completions)
        job.future.set_result(Measurements(certainties[start:end], version))
        start = end


def fail(lanes: Batch, error: Exception) -> None:
    """Give each job this error."""
    for lane in lanes:
        for job in lane:
            job.future.set_exception(error)
