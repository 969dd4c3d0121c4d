"""The order of the queue, and its batches. Ranks are given; tokens are counted by hand."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_client.wire_policy import VersionDemand
from shopr1_rewards import load_recipe
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import CompletionTokens, PromptKey, PromptScope, Target, TokenGroup
from shopr1_service.scheduling import request_queue as module
from shopr1_service.scheduling.request_queue import QueuedGroup, RequestQueue

RULES = load_recipe("shop_r1").self_certainty
SCOPE = PromptScope(Target())
OTHER_RULES = RULES.model_copy(update={"temperature": 0.6})


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BATCH_TOKENS", 20)


def queued(
    prompt: int,
    num_prompt: int,
    *own: int,
    rank_s: float,
    rules: SelfCertaintyRecipe = RULES,
    scope: PromptScope = SCOPE,
) -> QueuedGroup:
    """A prompt of this token so many times, and completions of so many tokens."""
    completions = [CompletionTokens(range(num), [0]) for num in own]
    group = TokenGroup(PromptKey((prompt,) * num_prompt, scope), completions)
    return QueuedGroup(group, rules, submitted_s=0.0, rank_s=rank_s)


def queue_of(*groups: QueuedGroup, merges: bool = True) -> RequestQueue:
    queue = RequestQueue(merges=merges)
    for each in groups:
        queue.add([each])
    return queue


def taken(queue: RequestQueue) -> list[list[list[float]]]:
    """All batches until the queue is empty: ranks, by prompt."""
    batches = []
    while queue:
        batches.append([[each.rank_s for each in prompt_batch] for prompt_batch in queue.take()])
    return batches


def test_lowest_rank_first() -> None:
    queue = queue_of(queued(1, 30, 1, rank_s=2), queued(2, 30, 1, rank_s=1), queued(3, 30, 1, rank_s=3))
    assert taken(queue) == [[[1]], [[2]], [[3]]]


def test_groups_with_one_prompt_are_a_prompt_batch_of_any_length() -> None:
    queue = queue_of(queued(1, 30, 1, rank_s=1), queued(2, 30, 1, rank_s=2), queued(1, 30, 4, 4, rank_s=3))
    assert taken(queue) == [[[1, 3]], [[2]]]


def test_the_rank_of_a_prompt_batch_is_its_lowest() -> None:
    queue = queue_of(queued(1, 30, 9, rank_s=5), queued(2, 30, 1, rank_s=2), queued(1, 30, 1, rank_s=1))
    assert taken(queue) == [[[1, 5]], [[2]]]


def test_merged_completions_are_bounded() -> None:
    queue = queue_of(*(queued(1, 30, 8, rank_s=rank) for rank in range(5)))
    assert taken(queue) == [[[0, 1]], [[2, 3]], [[4]]]


def test_a_group_larger_than_a_batch_is_taken_alone() -> None:
    queue = queue_of(queued(1, 3, 50, rank_s=1), queued(1, 3, 1, rank_s=2), queued(2, 3, 1, rank_s=3))
    assert taken(queue) == [[[1]], [[2], [3]]]


def test_short_prompts_are_taken_together() -> None:
    # 5 + 2 tokens each: two fit into 20, with the third it would be 21.
    queue = queue_of(*(queued(i, 5, 2, rank_s=i) for i in range(5)))
    assert taken(queue) == [[[0], [1]], [[2], [3]], [[4]]]


def test_a_group_that_fits_overtakes_one_that_does_not() -> None:
    queue = queue_of(queued(1, 5, 2, rank_s=1), queued(2, 30, 1, rank_s=2), queued(3, 5, 1, rank_s=3))
    assert taken(queue) == [[[1], [3]], [[2]]]


def test_of_another_prompt_only_the_groups_that_fit_are_taken() -> None:
    # 12 tokens are free beside the first: prompt 5 and completions 3 and 3, not the third.
    others = [queued(2, 5, 3, rank_s=rank) for rank in (2, 3, 4)]
    assert taken(queue_of(queued(1, 5, 3, rank_s=1), *others)) == [[[1], [2, 3]], [[4]]]


def test_groups_with_other_rules_are_not_merged() -> None:
    queue = queue_of(
        queued(1, 3, 1, rank_s=1),
        queued(1, 3, 1, rank_s=2, rules=OTHER_RULES),
        queued(2, 3, 1, rank_s=3),
        queued(2, 3, 1, rank_s=4, rules=OTHER_RULES),
    )
    assert taken(queue) == [[[1], [3]], [[2], [4]]]


def test_without_merging_each_group_is_a_batch() -> None:
    queue = queue_of(
        queued(1, 3, 1, rank_s=1), queued(1, 3, 1, rank_s=2), queued(2, 3, 1, rank_s=3), merges=False
    )
    assert taken(queue) == [[[1]], [[2]], [[3]]]


def test_a_shared_prompt_counts_once() -> None:
    first, second, other = (
        queued(1, 30, 1, 2, rank_s=1),
        queued(1, 30, 4, rank_s=2),
        queued(2, 7, 1, rank_s=3),
    )
    queue = RequestQueue()
    assert queue.num_added_tokens([first, second, other]) == 30 + 3 + 4 + 8
    queue.add([first, second, other])
    assert queue.num_tokens == 45
    assert queue.num_added_tokens([queued(1, 30, 5, rank_s=4)]) == 5
    queue.discard([first])
    assert queue.num_tokens == 42
    queue.discard([first])  # is not queued any more
    queue.discard([second])
    assert queue.num_tokens == 8
    queue.take()
    assert queue.num_tokens == 0
    assert not queue


def test_many_groups_of_one_prompt_are_removed_in_linear_time() -> None:
    # Each group's identity is looked at a few times, however many there are.
    num_looks = 0

    class Counting(QueuedGroup):
        def __hash__(self) -> int:
            nonlocal num_looks
            num_looks += 1
            return id(self)

    prompt = queued(1, 3, 1, rank_s=0.0)
    groups = [Counting(prompt.group, prompt.rules, 0.0, float(-i)) for i in range(2000)]
    queue = RequestQueue()
    queue.add(groups)
    assert [each.rank_s for each in queue] == sorted(each.rank_s for each in groups)
    queue.discard(groups[:1500])
    assert list(queue) == groups[:1499:-1]
    assert num_looks <= 5 * len(groups)


SCOPES = st.builds(
    PromptScope,
    st.sampled_from([Target(), Target("adapter"), Target(demand=VersionDemand(exact="1"))]),
    st.sampled_from([b"", b"an image", b"another"]),
)


@given(scopes=st.lists(SCOPES, min_size=2, max_size=6))
def test_equal_ids_of_different_scopes_share_no_prompt_batch(scopes: list[PromptScope]) -> None:
    queue = queue_of(*(queued(1, 3, 1, rank_s=rank, scope=scope) for rank, scope in enumerate(scopes)))
    assert queue.num_tokens == 3 * len(set(scopes)) + len(scopes)
    seen = []
    while queue:
        batch = queue.take()
        assert len({each.group.prompt.scope.weights for prompt_batch in batch for each in prompt_batch}) == 1
        for prompt_batch in batch:
            assert len({each.group.prompt.scope for each in prompt_batch}) == 1
            seen.append(prompt_batch[0].group.prompt)
    assert len(seen) == len(set(seen)) == len(set(scopes))


GROUPS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([1, 5, 18, 40]),
        st.lists(st.integers(1, 30), min_size=1, max_size=4),
        st.integers(0, 9),
        st.booleans(),
    ),
    max_size=12,
)


@given(drawn=GROUPS, merges=st.booleans(), dropped=st.sets(st.integers(0, 11)))
def test_everything_is_taken_once_and_counted(
    drawn: Sequence[tuple[int, int, list[int], int, bool]], merges: bool, dropped: set[int]
) -> None:
    groups = [
        queued(prompt, num, *own, rank_s=rank, rules=RULES if plain else OTHER_RULES)
        for prompt, num, own, rank, plain in drawn
    ]
    queue = RequestQueue(merges=merges)
    queue.add(groups)
    for index in dropped & set(range(len(groups))):
        queue.discard([groups[index]])
    kept = [each for index, each in enumerate(groups) if index not in dropped]
    seen: list[QueuedGroup] = []
    while queue:
        lowest = min(each.rank_s for each in queue)
        batch = queue.take()
        assert batch[0][0].rank_s == lowest
        assert len({each.batch_key for prompt_batch in batch for each in prompt_batch}) == 1
        assert all(len({each.group.prompt_ids for each in prompt_batch}) == 1 for prompt_batch in batch)
        num_tokens = sum(
            len(prompt_batch[0].group.prompt_ids) + sum(map(own_tokens, prompt_batch))
            for prompt_batch in batch
        )
        assert num_tokens <= 20 or len(batch) == 1
        seen += [each for prompt_batch in batch for each in prompt_batch]
        rest = [each for each in kept if each not in seen]
        prompts = {(each.group.prompt_ids, each.batch_key) for each in rest}
        assert queue.num_tokens == sum(len(ids) for ids, _ in prompts) + sum(map(own_tokens, rest))
    assert len(seen) == len(kept)
    assert all(each in seen for each in kept)


def own_tokens(each: QueuedGroup) -> int:
    return sum(len(completion.ids) for completion in each.group.completions)
