"""How far a start is: told to whoever asks before the service is ready."""

import logging
import time
from enum import StrEnum

logger = logging.getLogger(__name__)


class Step(StrEnum):
    """What happens before the service can score, in this order."""

    BEGINNING = "beginning"
    READING_WEIGHTS = "reading the policy's weights"
    CHECKING = "comparing its forwards with the model's own"
    WARMING_UP = "running passes of the sizes that will come"


class LoadProgress:
    """Written by the thread that loads, read by the event loop."""

    def __init__(self) -> None:
        self._step = Step.BEGINNING
        self._since_s = time.monotonic()

    def enter(self, step: Step) -> None:
        self._step = step
        logger.info("start, step %d of %d: %s", self._number, len(Step), step)

    @property
    def _number(self) -> int:
        return list(Step).index(self._step) + 1

    def __str__(self) -> str:
        elapsed_s = time.monotonic() - self._since_s
        return f"{self._step} (step {self._number} of {len(Step)}, {elapsed_s:.0f} s since the start)"
