"""The memory budget: exact accounts, refusals by what would help, and kept answers that make room."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_client.errors import OverloadedError, ProblemError, TooLargeError
from shopr1_service.memory.budget import Account, Hold, MemoryBudget

MAX_BYTES = 1000


@dataclass
class Answers:
    """Kept answers of 10 bytes, which make room for others."""

    budget: MemoryBudget
    kept: list[Hold] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.budget.evict_with(self.evict)

    def keep(self, num_bytes: int = 10) -> None:
        self.kept.append(self.budget.hold(Account.ANSWERS, num_bytes))

    def evict(self) -> bool:
        if not self.kept:
            return False
        self.kept.pop(0).release()
        return True


def total(budget: MemoryBudget) -> int:
    return sum(map(budget.num_bytes, Account))


def test_holds_are_counted_by_account_until_they_are_released() -> None:
    budget = MemoryBudget(MAX_BYTES)
    request, labels = budget.hold(Account.REQUESTS, 100), budget.hold(Account.LABELS, 50)
    request.grow(20)
    labels.resize(30)
    assert (budget.num_bytes(Account.REQUESTS), budget.num_bytes(Account.LABELS)) == (120, 30)
    request.release()
    request.release()  # does nothing
    assert (budget.num_bytes(Account.REQUESTS), budget.num_bytes(Account.LABELS)) == (0, 30)


def test_a_hold_that_fits_later_is_overloaded() -> None:
    budget = MemoryBudget(MAX_BYTES)
    other, mine = budget.hold(Account.REQUESTS, 800), budget.hold(Account.REQUESTS, 100)
    with pytest.raises(OverloadedError, match="200 bytes of memory are needed, 900 are in use") as caught:
        mine.grow(200)
    assert caught.value.retry_after_s is not None
    assert (mine.num_bytes, total(budget)) == (100, 900)  # nothing has changed
    other.release()
    mine.grow(200)
    assert total(budget) == 300


def test_a_hold_that_never_fits_is_too_large() -> None:
    budget = MemoryBudget(MAX_BYTES)
    with pytest.raises(TooLargeError, match=r"1001 bytes of memory; .* max_client_memory_bytes = 1000"):
        budget.hold(Account.REQUESTS, 1001)
    labels = budget.hold(Account.LABELS, 700)
    with pytest.raises(TooLargeError, match="labels and adapters hold 700 bytes"):
        budget.hold(Account.REQUESTS, 301)
    held = budget.hold(Account.REQUESTS, 200)
    with pytest.raises(TooLargeError):  # a part of it fits, the whole does not
        held.grow(101)
    labels.release()
    held.grow(101)


def test_lasting_holds_leave_room_for_requests() -> None:
    budget = MemoryBudget(MAX_BYTES)
    budget.hold(Account.ADAPTERS, 500)
    budget.hold(Account.LABELS, 250)
    for account in (Account.ADAPTERS, Account.LABELS):
        with pytest.raises(TooLargeError, match="may hold 75% of max_client_memory_bytes = 1000"):
            budget.hold(account, 1)
    budget.hold(Account.REQUESTS, 250)


def test_answers_make_room_before_anything_is_refused() -> None:
    budget = MemoryBudget(MAX_BYTES)
    answers = Answers(budget)
    for _ in range(10):
        answers.keep()
    budget.hold(Account.REQUESTS, 935)  # 65 bytes are left: 4 of the 10 have to go
    assert budget.num_bytes(Account.ANSWERS) == 60
    with pytest.raises(OverloadedError):
        budget.hold(Account.REQUESTS, 70)
    assert total(budget) == 935


def test_answers_are_kept_where_nothing_would_help() -> None:
    budget = MemoryBudget(MAX_BYTES)
    answers = Answers(budget)
    answers.keep()
    with pytest.raises(TooLargeError):
        budget.hold(Account.REQUESTS, 2000)
    assert len(answers.kept) == 1


@pytest.mark.parametrize("account", [Account.RUNS, Account.ROLLOUT_LOG])
def test_accounts_that_are_bounded_elsewhere_are_never_refused(account: Account) -> None:
    budget = MemoryBudget(MAX_BYTES)
    budget.hold(account, 2000)
    assert budget.num_bytes(account) == 2000


def test_refusals_are_reported() -> None:
    refusals: list[None] = []
    budget = MemoryBudget(MAX_BYTES, lambda: refusals.append(None))
    answers = Answers(budget)
    answers.keep()
    budget.hold(Account.REQUESTS, 995)  # an answer goes: no refusal
    for num_bytes in (10, 2000):
        with pytest.raises(ProblemError):
            budget.hold(Account.REQUESTS, num_bytes)
    assert len(refusals) == 2


def test_memory_is_free_when_its_last_owner_has_released_it() -> None:
    budget = MemoryBudget(MAX_BYTES)
    with budget.hold(Account.REQUESTS, 100) as hold:
        work = hold.shared()
    assert total(budget) == 100
    work.grow(50)
    assert total(budget) == 150
    work.release()
    assert total(budget) == 0


def test_a_released_hold_stays_empty() -> None:
    budget = MemoryBudget(MAX_BYTES)
    hold = budget.hold(Account.REQUESTS, 100)
    hold.release()
    hold.grow(100)
    hold.shared().release()
    assert (hold.num_bytes, total(budget)) == (0, 0)


def test_threads_release_at_the_same_time() -> None:
    budget = MemoryBudget(10**9)
    holds = [[budget.hold(Account.ROLLOUT_LOG, 7) for _ in range(2000)] for _ in range(4)]
    threads = [
        threading.Thread(target=lambda own: [hold.release() for hold in own], args=(own,)) for own in holds
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total(budget) == 0


def take_step(
    what: str,
    new_hold: Callable[[Account, int], Hold],
    account: Account,
    num_bytes: int,
    index: int,
    answers: Answers,
    owners: list[Hold],
) -> None:
    hold = owners[index % len(owners)] if owners else None
    if what == "keep":
        answers.keep()
    elif what == "hold":
        owners.append(new_hold(account, num_bytes))
    elif what == "grow" and hold:
        hold.grow(num_bytes)
    elif what == "shrink" and hold:
        hold.resize(hold.num_bytes // 2)
    elif what == "share" and hold:
        owners.append(hold.shared())
    elif hold:
        owners.remove(hold)
        hold.release()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["hold", "grow", "shrink", "share", "release", "keep"]),
        st.sampled_from(list(Account)),
        st.integers(0, 400),
        st.integers(0, 50),
    ),
    max_size=60,
)


@given(steps=STEPS)
def test_any_steps_end_at_zero(steps: list[tuple[str, Account, int, int]]) -> None:
    """Also those that are refused: the accounts are the sums of what is held, and within the limit."""
    budget = MemoryBudget(MAX_BYTES)
    answers = Answers(budget)
    owners: list[Hold] = []
    for what, account, num_bytes, index in steps:
        with contextlib.suppress(OverloadedError, TooLargeError):
            take_step(what, budget.hold, account, num_bytes, index, answers, owners)
        held = {id(each): each for each in (*owners, *answers.kept)}
        assert total(budget) == sum(each.num_bytes for each in held.values())
        unrefused = budget.num_bytes(Account.RUNS) + budget.num_bytes(Account.ROLLOUT_LOG)
        assert total(budget) - unrefused <= MAX_BYTES
    for hold in owners:
        hold.release()
    while answers.evict():
        pass
    assert {account: budget.num_bytes(account) for account in Account} == dict.fromkeys(Account, 0)
