"""Warn where most completions of a run are invalid only because of one special token at their end."""

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from shopr1_service.core import ScoredGroup

logger = logging.getLogger(__name__)

MIN_COMPLETIONS = 16
"""Completions of a run before a share is computed."""
_MAX_COMPLETIONS = 1024
"""Completions after which a count begins again, so that a change in the middle of a run is noticed."""
_SHARE = 0.5


@dataclass
class _Counts:
    num_completions: int = 0
    unknown_ends: Counter[str] = field(default_factory=Counter)


class EndTokenWatch:
    """Counts unknown end tokens by run, and logs a warning for each token that more than half end with.

    Args:
        max_runs: runs that are counted; the one that was idle longest is dropped first.
    """

    def __init__(self, max_runs: int) -> None:
        self._max_runs = max_runs
        self._runs: OrderedDict[str, _Counts] = OrderedDict()
        self._warned: dict[str, set[str]] = {}

    def observe(self, scored: ScoredGroup) -> None:
        """Count a scored group (an `Observer`)."""
        run = scored.origin.run
        counts = self._runs.setdefault(run, _Counts())
        self._runs.move_to_end(run)
        counts.num_completions += len(scored.facts.rollouts)
        counts.unknown_ends.update(filter(None, (facts.unknown_end for facts in scored.facts.rollouts)))
        if counts.num_completions >= MIN_COMPLETIONS:
            self._warn(run, counts)
        if counts.num_completions >= _MAX_COMPLETIONS:
            self._runs[run] = _Counts()
        while len(self._runs) > self._max_runs:
            gone, _ = self._runs.popitem(last=False)
            self._warned.pop(gone, None)

    def _warn(self, run: str, counts: _Counts) -> None:
        warned = self._warned.setdefault(run, set())
        for token, count in counts.unknown_ends.most_common(1):
            if count > _SHARE * counts.num_completions and token not in warned:
                warned.add(token)
                logger.warning(
                    "run %r: %d of %d completions are invalid only because they end with %r, which is not an "
                    "end token of the policy; if it ends its turns, set end_tokens",
                    *(run, count, counts.num_completions, token),
                )
