"""What waits: its order, and what is taken together. Ranks are given; tokens are counted by hand."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_rewards import load_recipe
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Kind, MeasuredCompletion, TokenGroup
from shopr1_service.scheduling import request_queue as backlog_module
from shopr1_service.scheduling.request_queue import Job, RequestQueue

RULES = load_recipe("shop_r1").self_certainty
OTHER_RULES = RULES.model_copy(update={"temperature": 0.6})


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog_module, "MAX_BATCH_TOKENS", 20)


def job(prompt: int, num_prompt: int, *own: int, rank_s: float, rules: SelfCertaintyRecipe = RULES) -> Job:
    """A prompt of this token so many times, and completions of so many tokens."""
    completions = [MeasuredCompletion(range(num), [0]) for num in own]
    return Job(TokenGroup((prompt,) * num_prompt, completions), Kind(rules), submitted_s=0.0, rank_s=rank_s)


def backlog_of(*jobs: Job, joins: bool = True) -> RequestQueue:
    backlog = RequestQueue(joins=joins)
    for each in jobs:
        backlog.add([each])
    return backlog


def taken(backlog: RequestQueue) -> list[list[list[float]]]:
    """All batches until nothing waits: ranks, by prompt."""
    batches = []
    while backlog:
        batches.append([[each.rank_s for each in lane] for lane in backlog.take()])
    return batches


def test_lowest_rank_first() -> None:
    backlog = backlog_of(job(1, 30, 1, rank_s=2), job(2, 30, 1, rank_s=1), job(3, 30, 1, rank_s=3))
    assert taken(backlog) == [[[1]], [[2]], [[3]]]


def test_one_prompt_is_one_lane_whatever_its_length() -> None:
    backlog = backlog_of(job(1, 30, 1, rank_s=1), job(2, 30, 1, rank_s=2), job(1, 30, 4, 4, rank_s=3))
    assert taken(backlog) == [[[1, 3]], [[2]]]


def test_a_lane_is_as_urgent_as_its_most_urgent_job() -> None:
    backlog = backlog_of(job(1, 30, 9, rank_s=5), job(2, 30, 1, rank_s=2), job(1, 30, 1, rank_s=1))
    assert taken(backlog) == [[[1, 5]], [[2]]]


def test_completions_that_join_are_bounded() -> None:
    backlog = backlog_of(*(job(1, 30, 8, rank_s=rank) for rank in range(5)))
    assert taken(backlog) == [[[0, 1]], [[2, 3]], [[4]]]


def test_what_is_larger_than_a_batch_goes_alone() -> None:
    backlog = backlog_of(job(1, 3, 50, rank_s=1), job(1, 3, 1, rank_s=2), job(2, 3, 1, rank_s=3))
    assert taken(backlog) == [[[1]], [[2], [3]]]


def test_short_prompts_go_together() -> None:
    # 5 + 2 tokens each: two fit into 20, with the third it would be 21.
    backlog = backlog_of(*(job(i, 5, 2, rank_s=i) for i in range(5)))
    assert taken(backlog) == [[[0], [1]], [[2], [3]], [[4]]]


def test_what_fits_goes_along_past_what_does_not() -> None:
    backlog = backlog_of(job(1, 5, 2, rank_s=1), job(2, 30, 1, rank_s=2), job(3, 5, 1, rank_s=3))
    assert taken(backlog) == [[[1], [3]], [[2]]]


def test_of_another_prompt_only_what_fits_is_taken() -> None:
    # 12 tokens are free beside the first: prompt 5 and completions 3 and 3, not the third.
    others = [job(2, 5, 3, rank_s=rank) for rank in (2, 3, 4)]
    assert taken(backlog_of(job(1, 5, 3, rank_s=1), *others)) == [[[1], [2, 3]], [[4]]]


def test_other_rules_do_not_join() -> None:
    backlog = backlog_of(
        job(1, 3, 1, rank_s=1),
        job(1, 3, 1, rank_s=2, rules=OTHER_RULES),
        job(2, 3, 1, rank_s=3),
        job(2, 3, 1, rank_s=4, rules=OTHER_RULES),
    )
    assert taken(backlog) == [[[1], [3]], [[2], [4]]]


def test_without_joining_each_goes_alone() -> None:
    backlog = backlog_of(job(1, 3, 1, rank_s=1), job(1, 3, 1, rank_s=2), job(2, 3, 1, rank_s=3), joins=False)
    assert taken(backlog) == [[[1]], [[2]], [[3]]]


def test_a_shared_prompt_counts_once() -> None:
    first, second, other = job(1, 30, 1, 2, rank_s=1), job(1, 30, 4, rank_s=2), job(2, 7, 1, rank_s=3)
    backlog = RequestQueue()
    assert backlog.num_added_tokens([first, second, other]) == 30 + 3 + 4 + 8
    backlog.add([first, second, other])
    assert backlog.num_tokens == 45
    assert backlog.num_added_tokens([job(1, 30, 5, rank_s=4)]) == 5
    backlog.discard(first)
    assert backlog.num_tokens == 42
    backlog.discard(first)  # is not there any more
    backlog.discard(second)
    assert backlog.num_tokens == 8
    backlog.take()
    assert backlog.num_tokens == 0
    assert not backlog


JOBS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([1, 5, 18, 40]),
        st.lists(st.integers(1, 30), min_size=1, max_size=4),
        st.integers(0, 9),
        st.booleans(),
    ),
    max_size=12,
)


@given(drawn=JOBS, joins=st.booleans(), dropped=st.sets(st.integers(0, 11)))
def test_everything_is_taken_once_and_counted(
    drawn: Sequence[tuple[int, int, list[int], int, bool]], joins: bool, dropped: set[int]
) -> None:
    jobs = [
        job(prompt, num, *own, rank_s=rank, rules=RULES if plain else OTHER_RULES)
        for prompt, num, own, rank, plain in drawn
    ]
    backlog = RequestQueue(joins=joins)
    backlog.add(jobs)
    for index in dropped & set(range(len(jobs))):
        backlog.discard(jobs[index])
    kept = [each for index, each in enumerate(jobs) if index not in dropped]
    seen: list[Job] = []
    while backlog:
        lowest = min(each.rank_s for each in backlog)
        batch = backlog.take()
        assert batch[0][0].rank_s == lowest
        assert len({each.kind for lane in batch for each in lane}) == 1
        assert all(len({each.group.prompt_ids for each in lane}) == 1 for lane in batch)
        num_tokens = sum(len(lane[0].group.prompt_ids) + sum(map(own_tokens, lane)) for lane in batch)
        assert num_tokens <= 20 or len(batch) == 1
        seen += [each for lane in batch for each in lane]
        rest = [each for each in kept if each not in seen]
        prompts = {(each.group.prompt_ids, each.kind) for each in rest}
        assert backlog.num_tokens == sum(len(ids) for ids, _ in prompts) + sum(map(own_tokens, rest))
    assert len(seen) == len(kept)
    assert all(each in seen for each in kept)


def own_tokens(each: Job) -> int:
    return sum(len(completion.ids) for completion in each.group.completions)
