"""Something that the engine's thread does between two batches."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from shopr1_client.errors import NotReadyError
from shopr1_service.engine import FatalEngineError

_RETRY_AFTER_S = 5.0

Result = TypeVar("Result")


class Errand(Generic[Result]):
    """A piece of work, and a future for what comes of it.

    Nobody can call it off: whoever asked for it may have gone, but what it changes should be changed.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self.future: Future[Result] = Future()
        self.future.set_running_or_notify_cancel()
        self._work = work

    def run(self) -> None:
        """Do it.

        Raises:
            FatalEngineError: the device is gone, or in a state that nothing can be measured in.
        """
        try:
            result = self._work()
        except FatalEngineError:
            self.dismiss("the engine has failed")
            raise
        except BaseException as error:  # handed over, whatever it is
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def dismiss(self, why: str) -> None:
        """It will not be done."""
        self.future.set_exception(NotReadyError(why, retry_after_s=_RETRY_AFTER_S))


def dismiss(errands: deque[Errand[Any]], why: str) -> None:
    """None of these will be done."""
    while errands:
        errands.popleft().dismiss(why)
