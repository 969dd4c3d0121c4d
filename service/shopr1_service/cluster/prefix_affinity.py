"""Which replica has the least left to compute for a prompt: what it keeps of it counts, and what waits there.

Completions of one prompt, and the steps of one shopping session, begin with the same tokens. A replica that
has computed them keeps their keys and values (`prefix.py`), and has only the rest to do. But it must not be
preferred when more work waits there than another one would need for the whole prompt.

What a replica keeps is guessed from what was sent to it: blocks of tokens, least recently used ones go first.
No Ray here: `router.py` asks, and so does a simulation.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Generic, TypeVar

BLOCK_TOKENS = 64
"""What is known of a prompt is known in steps of this."""
MAX_KEPT_TOKENS = 1_000_000
"""Taken for what a replica can keep, unless somebody says otherwise."""
_PRIME = 2**61 - 1

Replica = TypeVar("Replica", bound=Hashable)


@dataclass(frozen=True)
class Work:
    """What a group asks of an engine.

    Attributes:
        blocks: digests of the prompt's beginnings, each a block longer than the one before.
        num_prompt_tokens: of the prompt.
        num_own_tokens: of its completions.
    """

    blocks: tuple[bytes, ...]
    num_prompt_tokens: int
    num_own_tokens: int

    @classmethod
    def of(cls, prompt_ids: Sequence[int], num_own_tokens: int) -> "Work":
        return cls(tuple(_blocks(prompt_ids)), len(prompt_ids), num_own_tokens)


@dataclass
class _Guess:
    """What is known of a replica.

    Attributes:
        factor, summand: its own, below `_PRIME`.
    """

    factor: int
    summand: int
    num_waiting_tokens: int = 0
    kept: "OrderedDict[bytes, None]" = field(default_factory=OrderedDict)

    @classmethod
    def of(cls, replica: Hashable) -> "_Guess":
        digest = hashlib.blake2b(repr(replica).encode(), digest_size=32).digest()
        return cls(int.from_bytes(digest[:16]) % _PRIME, int.from_bytes(digest[16:]) % _PRIME)

    def rank(self, work: Work, prompt: int, missing_weight: int) -> tuple[int, int]:
        """What there is to do before the work is done; the lowest is best.

        Args:
            prompt: a number that stands for it. Among equals it decides: so several routers that know nothing
                of each other agree.
        """
        num_tokens = self.num_waiting_tokens + missing_weight * self.num_missing_tokens(work)
        # A universal hash: of 256 replicas each is asked for every group, and a digest takes far longer.
        return num_tokens, (self.factor * prompt + self.summand) % _PRIME

    def num_missing_tokens(self, work: Work) -> int:
        """How much of it the replica would have to compute."""
        if not work.blocks or work.blocks[0] not in self.kept:  # most replicas, most of the time
            return work.num_prompt_tokens + work.num_own_tokens
        num_kept_blocks = sum(1 for _ in takewhile(self.kept.__contains__, work.blocks))
        return work.num_prompt_tokens - num_kept_blocks * BLOCK_TOKENS + work.num_own_tokens

    def keep(self, work: Work, max_blocks: int) -> None:
        # From the end: of a prompt that is used again, its beginning is what stays longest.
        for block in reversed(work.blocks):
            self.kept[block] = None
            self.kept.move_to_end(block)
        while len(self.kept) > max_blocks:
            self.kept.popitem(last=False)


class Affinity(Generic[Replica]):
    """See the module.

    Args:
        max_kept_tokens: what a replica can keep.
        missing_weight: how many tokens that wait a token is worth that would have to be computed. With 1 a
            group goes where it is done soonest. What is computed twice keeps others waiting, too, which more
            than 1 allows for.
    """

    def __init__(self, max_kept_tokens: int = MAX_KEPT_TOKENS, *, missing_weight: int = 1) -> None:
        self._missing_weight = missing_weight
        self._max_blocks = max_kept_tokens // BLOCK_TOKENS
        self._guesses: dict[Replica, _Guess] = {}
        self._running: dict[Hashable, tuple[Replica, int]] = {}

    def ranked(self, work: Work, replicas: Sequence[Replica]) -> list[Replica]:
        """Replicas, the one first that will be done soonest."""
        prompt = int.from_bytes(work.blocks[-1]) % _PRIME if work.blocks else 0
        weight = self._missing_weight
        return sorted(replicas, key=lambda replica: self._guess(replica).rank(work, prompt, weight))

    def begin(self, key: Hashable, work: Work, replica: Replica) -> None:
        """Work was sent to a replica, perhaps because another one did not take it.

        Args:
            key: by which its end will be told.
        """
        self.end(key)
        guess = self._guess(replica)
        num_tokens = guess.num_missing_tokens(work)
        guess.num_waiting_tokens += num_tokens
        guess.keep(work, self._max_blocks)
        self._running[key] = replica, num_tokens

    def end(self, key: Hashable) -> None:
        """Work is done, or has failed."""
        replica, num_tokens = self._running.pop(key, (None, 0))
        if replica is not None and replica in self._guesses:
            self._guesses[replica].num_waiting_tokens -= num_tokens

    def keep_only(self, replicas: Sequence[Replica]) -> None:
        """The others are gone, and with them what they kept."""
        alive = set(replicas)
        self._guesses = {replica: guess for replica, guess in self._guesses.items() if replica in alive}

    def _guess(self, replica: Replica) -> _Guess:
        guess = self._guesses.get(replica)
        if guess is None:
            guess = self._guesses[replica] = _Guess.of(replica)
        return guess


def _blocks(prompt_ids: Sequence[int]) -> Iterator[bytes]:
    ids, digest = array("q", prompt_ids), hashlib.blake2b(digest_size=16)
    for end in range(BLOCK_TOKENS, len(ids) + 1, BLOCK_TOKENS):
        digest.update(ids[end - BLOCK_TOKENS : end].tobytes())
        yield digest.digest()
