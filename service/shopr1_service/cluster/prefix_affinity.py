"""Choose the engine that will finish a prompt first, given its queue and its prefix cache.

Completions of one prompt, and the steps of one shopping session, start with the same tokens. An engine that
has computed them keeps their KV in its prefix cache, and computes only the rest. It is not preferred if more
tokens are queued there than another engine would need for the whole prompt.

The content of an engine's cache is estimated from the prompts that were sent to it: an LRU of token blocks.
This module does not know Ray; a simulation uses it, too.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Generic, TypeVar

BLOCK_TOKENS = 64
"""Size of the blocks in which prompts are compared."""
MAX_KEPT_TOKENS = 1_000_000
"""Assumed capacity of an engine's prefix cache."""
_PRIME = 2**61 - 1

Replica = TypeVar("Replica", bound=Hashable)


@dataclass(frozen=True)
class Work:
    """Cost of a group.

    Attributes:
        blocks: digests of the prompt's prefixes of 1, 2, 3 … blocks.
        num_prompt_tokens: length of the prompt.
        num_own_tokens: length of the completions.
    """

    blocks: tuple[bytes, ...]
    num_prompt_tokens: int
    num_own_tokens: int

    @classmethod
    def of(cls, prompt_ids: Sequence[int], num_own_tokens: int) -> "Work":
        """Cost of a prompt and its completions."""
        return cls(tuple(_prefix_digests(prompt_ids)), len(prompt_ids), num_own_tokens)


@dataclass
class _Estimate:
    """Estimated queue and prefix cache of a replica.

    Attributes:
        factor, summand: parameters of the replica's hash function, below `_PRIME`.
    """

    factor: int
    summand: int
    num_waiting_tokens: int = 0
    kept: "OrderedDict[bytes, None]" = field(default_factory=OrderedDict)

    @classmethod
    def of(cls, replica: Hashable) -> "_Estimate":
        digest = hashlib.blake2b(repr(replica).encode(), digest_size=32).digest()
        return cls(int.from_bytes(digest[:16]) % _PRIME, int.from_bytes(digest[16:]) % _PRIME)

    def rank(self, work: Work, prompt: int, missing_weight: int) -> tuple[int, int]:
        """Tokens until the work is done (lowest is best), and a tie-breaker.

        The tie-breaker is a universal hash of the prompt's number: independent routers agree on it, and it
        is far cheaper than a digest for each of 256 replicas.
        """
        num_tokens = self.num_waiting_tokens + missing_weight * self.num_missing_tokens(work)
        return num_tokens, (self.factor * prompt + self.summand) % _PRIME

    def num_missing_tokens(self, work: Work) -> int:
        """Tokens that the replica has to compute."""
        num_tokens = work.num_prompt_tokens + work.num_own_tokens
        if not work.blocks or work.blocks[0] not in self.kept:  # most replicas, most of the time
            return num_tokens
        return num_tokens - BLOCK_TOKENS * sum(1 for _ in takewhile(self.kept.__contains__, work.blocks))

    def keep(self, work: Work, max_blocks: int) -> None:
        """Add a prompt to the cache. Its longest prefixes are evicted first."""
        for block in reversed(work.blocks):
            self.kept[block] = None
            self.kept.move_to_end(block)
        while len(self.kept) > max_blocks:
            self.kept.popitem(last=False)


class Affinity(Generic[Replica]):
    """Ranks replicas by prefix affinity.

    Args:
        max_kept_tokens: capacity of a replica's prefix cache.
        missing_weight: number of queued tokens that count as much as one token to compute. With 1, a group
            goes where it is done soonest. Higher values also count the delay of others by repeated work.
    """

    def __init__(self, max_kept_tokens: int = MAX_KEPT_TOKENS, *, missing_weight: int = 1) -> None:
        self._missing_weight = missing_weight
        self._max_blocks = max_kept_tokens // BLOCK_TOKENS
        self._estimates: dict[Replica, _Estimate] = {}
        self._running: dict[Hashable, tuple[Replica, int]] = {}

    def ranked(self, work: Work, replicas: Sequence[Replica]) -> list[Replica]:
        """Replicas, the one first that will be done soonest."""
        prompt = int.from_bytes(work.blocks[-1]) % _PRIME if work.blocks else 0
        weight = self._missing_weight
        return sorted(replicas, key=lambda replica: self._estimate(replica).rank(work, prompt, weight))

    def begin(self, key: Hashable, work: Work, replica: Replica) -> None:
        """Record that work was sent to a replica, perhaps after another one has not accepted it.

        Args:
            key: id of the work, as `end` gets it.
        """
        self.end(key)
        estimate = self._estimate(replica)
        num_tokens = estimate.num_missing_tokens(work)
        estimate.num_waiting_tokens += num_tokens
        estimate.keep(work, self._max_blocks)
        self._running[key] = replica, num_tokens

    def end(self, key: Hashable) -> None:
        """Record that work is done, or has failed."""
        replica, num_tokens = self._running.pop(key, (None, 0))
        if replica is not None and replica in self._estimates:
            self._estimates[replica].num_waiting_tokens -= num_tokens

    def keep_only(self, replicas: Sequence[Replica]) -> None:
        """Forget all other replicas: they do not exist any more."""
        self._estimates = {each: self._estimates[each] for each in replicas if each in self._estimates}

    def _estimate(self, replica: Replica) -> _Estimate:
        if replica not in self._estimates:
            self._estimates[replica] = _Estimate.of(replica)
        return self._estimates[replica]


def _prefix_digests(prompt_ids: Sequence[int]) -> Iterator[bytes]:
    ids, digest = array("q", prompt_ids), hashlib.blake2b(digest_size=16)
    for end in range(BLOCK_TOKENS, len(ids) + 1, BLOCK_TOKENS):
        digest.update(ids[end - BLOCK_TOKENS : end].tobytes())
        yield digest.digest()
