"""Keeps the participants together: gives them tasks, and answers what they must decide alike."""

import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from shopr1_service.engine import FatalEngineError
from shopr1_service.errors import PolicyError
from shopr1_service.tensor_parallel.messages import Done, Failed, Least, Outcome, Tried, Verdict, is_failure

_SILENCE_S = 30.0
"""After one has failed, how long until those that are silent wait for it in vain. A pass takes less."""


class Coordinator:
    """See the module. Used from one thread at a time.

    Args:
        connections: to the participants, by rank.
    """

    def __init__(self, connections: Sequence[Connection], *, silence_s: float = _SILENCE_S) -> None:
        self._connections = connections
        self._silence_s = silence_s

    def run(self, task: object) -> list[Any]:
        """Have all do a task; what comes of it, by rank.

        Raises:
            PolicyError, RuntimeError: all failed in the same way.
            FatalEngineError: a process has ended, or they cannot go on together.
        """
        self._send(task)
        while True:
            answers = self._gather()
            if all(isinstance(answer, Done) for answer in answers):
                return [answer.result for answer in answers]
            self._send(_reply(answers))

    def close(self) -> None:
        """The participants end."""
        for connection in self._connections:
            connection.close()

    def _send(self, message: object) -> None:
        frame = pickle.dumps(message)
        for rank, connection in enumerate(self._connections):
            try:
                connection.send_bytes(frame)
            except OSError as error:
                raise _ended(rank) from error

    def _gather(self) -> list[Any]:
        """One message of each."""
        answers: dict[int, Any] = {}
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        while waiting:
            has_failed = any(map(is_failure, answers.values()))
            ready = wait(list(waiting), self._silence_s if has_failed else None)
            if not ready:
                raise FatalEngineError(f"{_flaws(answers)}; the other devices wait for it in vain")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                answers[rank] = _receive(connection, rank)
        return [answers[rank] for rank in sorted(answers)]


def _receive(connection: Connection, rank: int) -> Any:  # noqa: ANN401
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise _ended(rank) from error


def _ended(rank: int) -> FatalEngineError:
    return FatalEngineError(f"the process of device {rank} has ended")


def _reply(answers: Sequence[Any]) -> object:
    if all(isinstance(answer, Least) for answer in answers):
        return min(answer.number for answer in answers)
    if all(isinstance(answer, Tried) for answer in answers):
        return _verdict(answers)
    if all(isinstance(answer, Failed) for answer in answers):
        first: Failed = answers[0]
        raise PolicyError(first.message) if first.is_policy_error else RuntimeError(first.message)
    raise FatalEngineError(_flaws(dict(enumerate(answers))) or f"the devices do not do the same: {answers}")


def _verdict(answers: Sequence[Tried]) -> Verdict:
    outcomes = {answer.outcome for answer in answers}
    are_level = len({answer.num_collectives for answer in answers}) == 1
    if are_level and outcomes == {Outcome.GOOD}:
        return Verdict.GO_ON
    if are_level and Outcome.FAILED not in outcomes:
        return Verdict.TRY_AGAIN
    raise FatalEngineError(
        _flaws(dict(enumerate(answers))) or "the devices have not done the same collectives"
    )


def _flaws(answers: dict[int, Any]) -> str:
    """Who has failed, of those that have answered."""
    return "; ".join(
        f"device {rank} failed: {answer.message}"
        for rank, answer in sorted(answers.items())
        if is_failure(answer)
    )
