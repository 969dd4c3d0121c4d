"""Consecutive new tokens of one row, and what they have before them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from shopr1_service.prefix import Chunk


@dataclass(frozen=True)
class Segment:
    """Consecutive new tokens and the chunks before them."""

    ids: Sequence[int]
    prefix: Sequence[Chunk]

    @property
    def num_prefix_tokens(self) -> int:
        return sum(map(len, self.prefix))


def starts_of(segments: Sequence[Segment]) -> list[int]:
    """Where each segment begins in a row of them all, and where the row ends."""
    return [0, *accumulate(len(segment.ids) for segment in segments)]
