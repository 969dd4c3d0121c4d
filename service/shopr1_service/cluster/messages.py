"""Messages between the HTTP side, the update coordinator and the engines."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from shopr1_client.errors import ProblemError
from shopr1_client.wire_policy import AdapterUpdate, PolicyUpdate, UpdateProgress
from shopr1_service.cluster.update_log import Change, UpdateLog
from shopr1_service.core import Target
from shopr1_service.policy.versions import VersionTable
from shopr1_service.weights.tensors import UpdateContents

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# --- between engines and coordinator ----------------------------------------------------------------

Answer = PolicyUpdate | AdapterUpdate | None
"""Answer to the client that asked for a change; None after an unload."""


@dataclass(frozen=True)
class Report:
    """State of an engine.

    Attributes:
        actor: Ray's handle of the engine's process, for liveness checks.
        number: number of the last change that it has applied.
        log_number: number of the last log that it has applied; -1: none, the engine is new.
    """

    engine: str
    actor: Any
    number: int
    log_number: int


@dataclass(frozen=True)
class SendLog:
    """Order to send the log: the engine knows a later one than the coordinator."""


@dataclass(frozen=True)
class TryUpdate:
    """Order to apply a change before all other engines do (as the canary), and to report the result."""

    number: int
    change: Change


class BehindError(Exception):
    """The engine cannot catch up with the others: it must restart. Also an order to do so."""


Order = SendLog | TryUpdate | UpdateLog | BehindError
"""Next step of an engine; an `UpdateLog` is to be applied."""


@dataclass(frozen=True)
class TrialResult:
    """Result of a `TryUpdate` that has succeeded, with the engine's version table after it."""

    table: VersionTable
    answer: Answer
    taken: UpdateContents | None = None


# --- between HTTP side and engines ------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """Constraints on the engine that scores a group.

    Attributes:
        among: names of the engines that may take it; None: all.
        min_number: an engine that has not applied the change of this number declines.
    """

    among: frozenset[str] | None = None
    min_number: int = 0


@dataclass(frozen=True)
class Declined:
    """An engine cannot score a group, but another one may.

    Attributes:
        problem: the answer to the client if no engine can.
    """

    engine: str
    problem: ProblemError


# --- from the coordinator to the HTTP side ----------------------------------------------------------


@dataclass(frozen=True)
class ClusterView:
    """The coordinator's view of the engines.

    Attributes:
        revision: increases with every change of the view.
        table: version table after the last change.
        min_number: number of the last change that all engines have applied.
        tables: version tables that engines may be at, by number.
        engines: ready engines, and the number of the last change of each.
        progress: progress of an update that is under way.
    """

    revision: int
    table: VersionTable
    min_number: int = 0
    tables: Mapping[int, VersionTable] = field(default_factory=dict)
    engines: Mapping[str, int] = field(default_factory=dict)
    progress: UpdateProgress | None = None

    def engines_with(self, target: Target) -> frozenset[str]:
        """Names of the ready engines that have the version that a request wants."""
        numbers = {number for number, table in self.tables.items() if _has(table, target)}
        return frozenset(engine for engine, number in self.engines.items() if number in numbers)


def _has(table: VersionTable, target: Target) -> bool:
    try:
        table.find(target)
    except ProblemError:
        return False
    return True


# --- errors that cross processes --------------------------------------------------------------------


def returns_problems(
    method: Callable[Parameters, Awaitable[Result]],
) -> Callable[Parameters, Awaitable[Result | ProblemError]]:
    """Decorator: return a `ProblemError` instead of raising it, as Ray would wrap it and log a traceback."""

    @wraps(method)
    async def returning(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result | ProblemError:
        try:
            return await method(*args, **kwargs)
        except ProblemError as error:
            return error

    return returning


def raise_problem(result: Result | ProblemError) -> Result:
    """Raise a problem that `returns_problems` has returned; pass on anything else."""
    if isinstance(result, ProblemError):
        raise result
    return result
