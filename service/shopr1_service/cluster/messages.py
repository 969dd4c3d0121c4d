"""What engines and the journal tell each other."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from shopr1_client.errors import ProblemError
from shopr1_client.wire_policy import AdapterUpdate, PolicyUpdate
from shopr1_service.cluster.update_log import Change, History
from shopr1_service.policy.versions import VersionTable
from shopr1_service.weights.tensors import UpdateContents

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

Answer = PolicyUpdate | AdapterUpdate | None
"""To whoever asked for a change; None after an unloading."""


@dataclass(frozen=True)
class Report:
    """An engine's state.

    Attributes:
        actor: Ray's handle of its process, by which to see whether it lives.
        number: of the last change that it has made.
        known: of the last one in the history that it was told; -1: none yet, it is new.
    """

    engine: str
    actor: Any
    number: int
    known: int


@dataclass(frozen=True)
class Tell:
    """It knows more of the history than the journal, and should say it."""


@dataclass(frozen=True)
class Trial:
    """It should make a change that nobody has made yet, and say what came of it."""

    number: int
    change: Change


@dataclass(frozen=True)
class Follow:
    """It should make what it has not made yet of a history."""

    history: History


@dataclass(frozen=True)
class Retire:
    """It cannot be brought to where the others are, and must begin anew."""

    why: str


Order = Tell | Trial | Follow | Retire


@dataclass(frozen=True)
class Outcome:
    """Of a trial.

    Attributes:
        table: of the engine, after it.
        problem: why the change was not made.
    """

    table: VersionTable
    answer: Answer = None
    taken: UpdateContents | None = None
    problem: ProblemError | None = None


def returning_problems(
    method: Callable[Parameters, Awaitable[Result]],
) -> Callable[Parameters, Awaitable[Result | ProblemError]]:
    """What it raises is returned: raised, Ray would wrap it, and log it as a bug."""

    @wraps(method)
    async def returns(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result | ProblemError:
        try:
            return await method(*args, **kwargs)
        except ProblemError as error:
            return error

    return returns


def raised(result: Result | ProblemError) -> Result:
    """On the other side: raise it, if it is one."""
    if isinstance(result, ProblemError):
        raise result
    return result
