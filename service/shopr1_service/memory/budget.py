"""The budget of memory for what clients send, and for what the service keeps because of it.

Each thing that is kept is a `Hold` in one of the accounts, from before it is stored until it is gone. The
budget refuses more: with 429 if it fits as soon as other requests are answered, with 413 if it never will.
Kept answers are given up before anything is refused.

Sizes are estimates (`sizes.py`). The accounts do not count the policy, the prefix cache, and what the service
needs without any client.
"""

import threading
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType
from typing import Self

from shopr1_client.errors import OverloadedError, ProblemError, TooLargeError

UNLIMITED = 2**63
RETRY_AFTER_S = 1.0
"""`Retry-After` where memory is short. It is free again as soon as another request is answered."""
_LASTING_SHARE = 0.75
_ANSWERS_SHARE = 0.125


class Account(StrEnum):
    """The kinds of memory that clients take."""

    REQUESTS = "requests"
    """Bodies, and what is parsed, prepared and answered of them, until the answer is sent."""
    ANSWERS = "answers"
    """Answers that are kept for clients that repeat their request; at most an eighth of the budget."""
    LABELS = "labels"
    """Registered ground truths."""
    ADAPTERS = "adapters"
    """Loaded adapters."""
    RUNS = "runs"
    """Series of training runs in the metrics. Never refused: `max_runs` bounds them."""
    ROLLOUT_LOG = "rollout_log"
    """Rollouts that wait to be written. Never refused: they are dropped beyond 64 MiB."""


_LASTING = frozenset({Account.LABELS, Account.ADAPTERS})
"""Kept until a client removes it. Together at most three quarters: the rest is left for requests."""
_UNREFUSED = frozenset({Account.RUNS, Account.ROLLOUT_LOG})


class MemoryBudget:
    """Accounts of memory with a common limit.

    Holds grow on the event loop's thread only, since kept answers belong to it. They shrink on any.

    Args:
        max_bytes: the limit.
        on_refusal: called for every refusal.
    """

    def __init__(self, max_bytes: int = UNLIMITED, on_refusal: Callable[[], None] = lambda: None) -> None:
        self.max_bytes = max_bytes
        self._on_refusal = on_refusal
        self._evict: Callable[[], bool] = lambda: False
        self._lock = threading.Lock()
        self._num_bytes = dict.fromkeys(Account, 0)

    @property
    def max_answers_bytes(self) -> int:
        """Most that kept answers take, also where nothing else needs the memory."""
        return int(_ANSWERS_SHARE * self.max_bytes)

    def num_bytes(self, account: Account) -> int:
        """Memory that an account holds."""
        return self._num_bytes[account]

    def hold(self, account: Account, num_bytes: int = 0) -> "Hold":
        """Hold memory.

        Raises:
            OverloadedError: it fits later.
            TooLargeError: it never fits.
        """
        hold = Hold(self, account)
        hold.grow(num_bytes)
        return hold

    def try_hold(self, account: Account, num_bytes: int) -> "Hold | None":
        """Hold memory that is free; None if there is not enough. Nothing is given up for it, or refused."""
        if self._try(account, num_bytes, 0) is not None:
            return None
        return Hold(self, account, num_bytes)

    def evict_with(self, evict: Callable[[], bool]) -> None:
        """Call `evict` when memory is short. It gives up something, or returns False."""
        self._evict = evict

    def add(self, account: Account, num_bytes: int, num_held_bytes: int) -> None:
        """Add to an account, or subtract from it.

        Args:
            num_held_bytes: what the hold that grows has already.

        Raises:
            OverloadedError, TooLargeError: see `hold`. Nothing has changed then, except that kept answers may
                be gone.
        """
        while (problem := self._try(account, num_bytes, num_held_bytes)) is not None:
            if isinstance(problem, TooLargeError) or not self._evict():
                self._on_refusal()
                raise problem

    def _try(self, account: Account, num_bytes: int, num_held_bytes: int) -> ProblemError | None:
        with self._lock:
            if num_bytes > 0 and account not in _UNREFUSED:
                problem = self._problem(account, num_bytes, num_held_bytes)
                if problem is not None:
                    return problem
            self._num_bytes[account] += num_bytes
            return None

    def _problem(self, account: Account, num_bytes: int, num_held_bytes: int) -> ProblemError | None:
        num_wanted = num_held_bytes + num_bytes
        num_lasting = sum(self._num_bytes[each] for each in _LASTING)
        limit = f"max_client_memory_bytes = {self.max_bytes}"
        if account in _LASTING:
            if num_lasting + num_bytes > _LASTING_SHARE * self.max_bytes:
                return TooLargeError(
                    f"{account} would take {num_wanted} bytes of memory; labels and adapters hold "
                    f"{num_lasting} bytes and may hold {_LASTING_SHARE:.0%} of {limit}"
                )
        elif num_wanted > self.max_bytes - num_lasting:
            return TooLargeError(
                f"the request takes {num_wanted} bytes of memory; labels and adapters hold {num_lasting} "
                f"bytes of {limit}"
            )
        num_all = sum(self._num_bytes.values())
        if num_all + num_bytes > self.max_bytes:
            detail = f"{num_bytes} bytes of memory are needed, {num_all} are in use, {limit}"
            return OverloadedError(detail, retry_after_s=RETRY_AFTER_S)
        return None


class Hold:
    """Memory of one thing, which may have several owners. It is free when the last one has released it.

    As a context manager it is one owner's.
    """

    def __init__(self, budget: MemoryBudget, account: Account, num_bytes: int = 0) -> None:
        self.num_bytes = num_bytes
        self._budget = budget
        self._account = account
        self._num_owners = 1

    def grow(self, num_bytes: int) -> None:
        """Hold more. Raises as `MemoryBudget.hold`; then nothing has changed."""
        self.resize(self.num_bytes + num_bytes)

    def resize(self, num_bytes: int) -> None:
        """Hold this many bytes. Raises as `MemoryBudget.hold`; then nothing has changed."""
        if not self._num_owners:  # it grew while its last owner was going
            return
        self._budget.add(self._account, num_bytes - self.num_bytes, self.num_bytes)
        self.num_bytes = num_bytes

    def shared(self) -> Self:
        """The same hold for a further owner, who releases it, too."""
        self._num_owners += bool(self._num_owners)
        return self

    def release(self) -> None:
        """Give it up. The last owner's call frees the memory; further calls do nothing."""
        if self._num_owners == 1:
            self.resize(0)
        self._num_owners = max(0, self._num_owners - 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.release()
