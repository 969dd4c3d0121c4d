"""Which engines may take a piece of work."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from shopr1_client.errors import ProblemError
from shopr1_client.wire_policy import UpdateProgress
from shopr1_service.core import Target
from shopr1_service.policy.versions import VersionTable


@dataclass(frozen=True)
class Route:
    """Goes with a piece of work.

    Attributes:
        among: ids of the engines that may take it; None: all.
        floor: whoever has not made the change of this number must refuse it.
    """

    among: frozenset[str] | None = None
    floor: int = 0


@dataclass(frozen=True)
class Elsewhere:
    """An engine's answer: it does not take this, perhaps another one does.

    Attributes:
        problem: what there is to say if none does.
    """

    engine: str
    problem: ProblemError


@dataclass(frozen=True)
class View:
    """What the journal knows of the engines.

    Attributes:
        revision: counts how often it has changed.
        table: after the last change.
        floor: number of the last change that all engines have made.
        tables: after each change that an engine is at, by its number.
        engines: number of the last change of each engine that is in rotation.
        progress: of a change that is under way.
    """

    revision: int
    table: VersionTable
    floor: int = 0
    tables: Mapping[int, VersionTable] = field(default_factory=dict)
    engines: Mapping[str, int] = field(default_factory=dict)
    progress: UpdateProgress | None = None

    def holders(self, target: Target) -> frozenset[str]:
        """Engines that can measure with what a request wants."""
        numbers = {number for number, table in self.tables.items() if _has(table, target)}
        return frozenset(engine for engine, number in self.engines.items() if number in numbers)


def _has(table: VersionTable, target: Target) -> bool:
    try:
        table.find(target)
    except ProblemError:
        return False
    return True
