"""Ranks of replicas: small cases by hand, and traces of shopping sessions."""

import random
from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from shopr1_service.cluster.prefix_affinity import BLOCK_TOKENS, Affinity, Work

REPLICAS = ["a", "b", "c"]


def prompt(*blocks: int, rest: int = 0) -> list[int]:
    """Blocks of equal tokens, and tokens that do not fill a block."""
    return [token for block in blocks for token in [block] * BLOCK_TOKENS] + [0] * rest


def work_of(*blocks: int, rest: int = 0, num_own_tokens: int = 10) -> Work:
    return Work.of(prompt(*blocks, rest=rest), num_own_tokens)


def test_the_digest_of_a_block_depends_on_all_blocks_before_it() -> None:
    some, others = work_of(1, 2, 3, rest=5), work_of(9, 2, 3)
    assert some.num_prompt_tokens == 3 * BLOCK_TOKENS + 5
    assert len(set(some.blocks) | set(others.blocks)) == 6
    assert work_of(1, 2).blocks == some.blocks[:2]


def test_a_longer_prompt_goes_where_its_prefix_is_cached() -> None:
    affinity = Affinity[str]()
    affinity.begin("first", work_of(1, 2), "b")
    affinity.end("first")
    assert affinity.ranked(work_of(1, 2, 3), REPLICAS)[0] == "b"
    assert affinity.ranked(work_of(1, 9), REPLICAS)[0] == "b"


def test_work_goes_elsewhere_when_the_queue_costs_more_than_the_cache_saves() -> None:
    affinity = Affinity[str]()
    affinity.begin("first", work_of(1, 2), "b")
    affinity.end("first")
    saved = 2 * BLOCK_TOKENS
    # Prompt and completions of other work are queued: as many tokens as the cache saves are not too many.
    affinity.begin("other", Work((), saved - 11, 10), "b")
    assert affinity.ranked(work_of(1, 2), REPLICAS)[0] == "b"
    affinity.begin("more", Work((), 2, 0), "b")
    assert affinity.ranked(work_of(1, 2), REPLICAS)[0] != "b"
    affinity.end("more")
    assert affinity.ranked(work_of(1, 2), REPLICAS)[0] == "b"


def test_missing_weight_makes_the_cache_count_twice() -> None:
    affinity = Affinity[str](missing_weight=2)
    affinity.begin("first", work_of(1, 2), "b")
    affinity.end("first")
    affinity.begin("other", Work((), 4 * BLOCK_TOKENS - 1, 0), "b")
    assert affinity.ranked(work_of(1, 2), REPLICAS)[0] == "b"
    affinity.begin("more", Work((), 2, 0), "b")
    assert affinity.ranked(work_of(1, 2), REPLICAS)[0] != "b"


def test_cached_tokens_do_not_count_as_queued() -> None:
    affinity = Affinity[str]()
    affinity.begin("first", work_of(1, 2), "b")  # 2 blocks and 10 tokens are queued
    affinity.begin("second", work_of(1, 2), "b")  # 10 more
    affinity.begin("a", Work((), 2 * BLOCK_TOKENS + 21, 0), "a")
    assert affinity.ranked(work_of(7), ["a", "b"])[0] == "b"
    affinity.begin("third", Work((), 2, 0), "b")
    assert affinity.ranked(work_of(7), ["a", "b"])[0] == "a"


def test_work_that_is_sent_again_is_queued_once() -> None:
    affinity = Affinity[str]()
    affinity.begin("first", work_of(1, 2), "a")
    affinity.begin("first", work_of(1, 2), "b")
    affinity.end("first")
    assert [estimate.num_waiting_tokens for estimate in affinity._estimates.values()] == [0, 0]


def test_least_recently_used_blocks_are_evicted() -> None:
    affinity = Affinity[str](max_kept_tokens=3 * BLOCK_TOKENS)
    for key, work in enumerate([work_of(1, 2), work_of(5, 6)]):
        affinity.begin(key, work, "b")
        affinity.end(key)
    # The first block of the older prompt is still cached.
    affinity.begin("c", Work((), BLOCK_TOKENS - 10, 0), "b")
    assert affinity.ranked(work_of(1, 2), ["b", "c"])[0] == "b"
    affinity.begin("d", Work((), 11, 0), "b")
    assert affinity.ranked(work_of(1, 2), ["b", "c"])[0] == "c"


def test_a_removed_replica_is_forgotten() -> None:
    affinity = Affinity[str]()
    affinity.begin("first", work_of(1, 2), "b")
    affinity.keep_only(["a", "c"])
    affinity.end("first")  # its replica does not exist any more
    affinity.begin("second", work_of(1), "a")
    affinity.end("second")
    assert affinity.ranked(work_of(1, 2), REPLICAS)[0] == "a"


def test_independent_routers_agree_and_spread_work() -> None:
    works = [work_of(i) for i in range(300)]
    first, second = Affinity[str](), Affinity[str]()
    chosen = [first.ranked(work, REPLICAS)[0] for work in works]
    assert chosen == [second.ranked(work, REPLICAS[::-1])[0] for work in works]
    assert min(chosen.count(replica) for replica in REPLICAS) > 70  # of 100; by chance, 4 standard deviations


def test_many_replicas_get_equal_shares() -> None:
    affinity, replicas = Affinity[str](), [f"engine-{i}" for i in range(32)]
    chosen = Counter(affinity.ranked(work_of(i), replicas)[0] for i in range(3200))
    assert max(abs(chosen[replica] - 100) for replica in replicas) < 50  # by chance, 5 standard deviations


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=40))
def test_when_all_work_is_done_nothing_is_queued(steps: Sequence[tuple[int, int, bool]]) -> None:
    affinity = Affinity[str]()
    running = []
    for key, (first, second, ends) in enumerate(steps):
        work = work_of(first, second)
        affinity.begin(key, work, affinity.ranked(work, REPLICAS)[0])
        running.append(key)
        if ends:
            affinity.end(running.pop(0))
    for key in running:
        affinity.end(key)
    assert all(estimate.num_waiting_tokens == 0 for estimate in affinity._estimates.values())


def test_all_steps_of_a_session_go_to_one_replica() -> None:
    """20 interleaved sessions of 8 steps each, with empty queues."""
    affinity, chance = Affinity[str](), random.Random(5)
    homes: dict[int, str] = {}
    steps = [session for session in range(20) for _ in range(8)]
    chance.shuffle(steps)
    lengths = dict.fromkeys(range(20), 0)
    for key, session in enumerate(steps):
        lengths[session] += 1
        work = work_of(*(1000 * session + i for i in range(lengths[session])))
        chosen = affinity.ranked(work, REPLICAS)[0]
        assert homes.setdefault(session, chosen) == chosen
        affinity.begin(key, work, chosen)
        affinity.end(key)
