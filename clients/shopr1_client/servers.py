"""Which of several servers a group goes to: always the same for one prompt, whose keys and values it keeps.

Rendezvous hashing: each server's weight for a key is a hash of both, and the heaviest comes first. When a
server is added or goes, only its own share of the prompts moves.
"""

import hashlib
from collections.abc import Sequence


def ranked(urls: Sequence[str], key: bytes) -> list[str]:
    """The servers in the order in which they are to be tried for this key."""
    return sorted(urls, key=lambda url: hashlib.blake2b(key, key=_digest(url)).digest(), reverse=True)


def _digest(url: str) -> bytes:
    return hashlib.blake2b(url.encode(), digest_size=32).digest()
