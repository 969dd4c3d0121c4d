"""A group that comes in parts is put together before it is measured.

Trainers that spread the rollouts of one prompt over processes send each a part. The parts name their group
and its size. The first waits until all are there, `group_wait_s` at most; what is there by then is measured
as one group, and each part gets its own. What comes later begins a new gathering.

For the numbers it makes no difference. It saves computing the prompt once more where models or settings do
not let it be kept, and with `deterministic` the bits do not depend on how the group was spread.
"""

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from shopr1_service.backlog import Kind, Measurements
from shopr1_service.engine import MeasuredCompletion, TokenGroup
from shopr1_service.flaws import refuse_if_any
from shopr1_service.measurer import Measurer
from shopr1_service.metrics import Metrics


@dataclass(frozen=True)
class Membership:
    """Of which group a part is.

    Attributes:
        size: rollouts in the whole group.
        num_rollouts: of this part, also those that have nothing to measure.
        path: of the part in its request, for errors.
    """

    group_id: str
    size: int
    num_rollouts: int
    path: str


@dataclass(eq=False)
class _Part:
    completions: Sequence[MeasuredCompletion]
    num_rollouts: int


@dataclass(eq=False)
class _Gathering:
    parts: list[_Part] = field(default_factory=list)
    prompt_ids: Sequence[int] = ()
    is_complete: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[dict[_Part, Measurements]] | None" = None

    @property
    def num_rollouts(self) -> int:
        return sum(part.num_rollouts for part in self.parts)


class Gatherings:
    """See the module. Used from the event loop only.

    Args:
        wait_s: how long the first part waits for the others.
    """

    def __init__(self, measurer: Measurer, metrics: Metrics, wait_s: float) -> None:
        self._measurer = measurer
        self._metrics = metrics
        self._wait_s = wait_s
        self._open: dict[Hashable, _Gathering] = {}

    async def measure(self, group: TokenGroup, membership: Membership, kind: Kind) -> Measurements:
        """Measurements of this part's completions. If cancelled, they are taken out, or dropped if last.

        Raises:
            InvalidRequestError: another part of the group has another prompt.
            ProblemError: as the measurer raises it, to every part.
        """
        key = (membership.group_id, membership.size, kind)
        gathering = self._open.setdefault(key, _Gathering())
        if group.completions:  # without any, the prompt has not even been tokenised
            _agree(gathering, group.prompt_ids, membership)
        part = _Part(group.completions, membership.num_rollouts)
        gathering.parts.append(part)
        if gathering.task is None:
            gathering.task = asyncio.create_task(self._measure(key, gathering, kind))
        if gathering.num_rollouts >= membership.size:
            self._close(key, gathering)
            gathering.is_complete.set()
        self._record()
        try:
            return (await asyncio.shield(gathering.task))[part]
        finally:
            gathering.parts.remove(part)
            if not gathering.parts:
                self._close(key, gathering)
                gathering.task.cancel()
            self._record()

    async def _measure(self, key: Hashable, gathering: _Gathering, kind: Kind) -> dict[_Part, Measurements]:
        try:
            async with asyncio.timeout(self._wait_s):
                await gathering.is_complete.wait()
        except TimeoutError:
            self._close(key, gathering)
        self._metrics.record_gathering(is_complete=gathering.is_complete.is_set())
        # In an order of their own: when each came is chance.
        parts = list(gathering.parts)
        places = [(part, i) for part in parts for i in range(len(part.completions))]
        places.sort(key=lambda place: tuple(place[0].completions[place[1]].ids))
        whole = TokenGroup(gathering.prompt_ids, [part.completions[i] for part, i in places])
        [measured] = await self._measurer.measure([whole], kind)
        values = dict(zip(places, measured.values, strict=True))
        return {
            part: Measurements([values[part, i] for i in range(len(part.completions))], measured.version)
            for part in parts
        }

    def _close(self, key: Hashable, gathering: _Gathering) -> None:
        """Let no further part in."""
        if self._open.get(key) is gathering:
            del self._open[key]
            self._record()

    def _record(self) -> None:
        num_parts = sum(len(gathering.parts) for gathering in self._open.values())
        self._metrics.record_waiting_parts(num_parts)


def _agree(gathering: _Gathering, prompt_ids: Sequence[int], membership: Membership) -> None:
    gathering.prompt_ids = gathering.prompt_ids or prompt_ids
    if gathering.prompt_ids != prompt_ids:
        message = f"another part of group {membership.group_id!r} has another prompt"
        refuse_if_any([{"location": f"{membership.path}.group_id", "message": message}])
