"""From jobs with the same prompt to what the engine measures, and from its measurements to each job's own."""

from collections.abc import Sequence

from shopr1_service.backlog import Batch, Job, Measurements
from shopr1_service.engine import Certainty, TokenGroup, Unmeasurable
from shopr1_service.versions import Version


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
