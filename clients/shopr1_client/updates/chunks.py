"""How tensors are cut for a transfer: both sides broadcast the same pieces."""

from collections.abc import Iterator

PIECE_BYTES = 16 * 2**20
"""The most that one broadcast carries.

From 4 MiB on, gloo is about as fast as the loopback; the receiver's memory grows with it.
"""


def cut(num_elements: int, element_bytes: int) -> Iterator[tuple[int, int]]:
    """First element of each piece and the one after its last; none where there are no elements.

    Args:
        element_bytes: of one element, at most `PIECE_BYTES`.

    >>> list(cut(5 * 2**20, 8))
    [(0, 2097152), (2097152, 4194304), (4194304, 5242880)]
    >>> list(cut(1, 2)), list(cut(0, 4))
    ([(0, 1)], [])
    """
    step = PIECE_BYTES // element_bytes
    for first in range(0, num_elements, step):
        yield first, min(first + step, num_elements)
