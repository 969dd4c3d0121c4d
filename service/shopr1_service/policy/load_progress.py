"""Progress of loading a policy, shown by the health check until the service is ready."""

import logging
import time
from enum import StrEnum

logger = logging.getLogger(__name__)


class Step(StrEnum):
    """Steps before the service can score, in order."""

    BEGINNING = "beginning"
    READING_WEIGHTS = "reading the policy's weights"
    CHECKING = "comparing forward strategies with the model"
    WARMING_UP = "running warm-up passes"


class LoadProgress:
    """Current step and elapsed time. Written by the loading thread, read by the event loop."""

    def __init__(self) -> None:
        self._step = Step.BEGINNING
        self._detail = ""
        self._started_s = time.monotonic()

    def enter(self, step: Step) -> None:
        """Begin a step."""
        self._step, self._detail = step, ""
        logger.info("start, step %d of %d: %s", self._number, len(Step), step)

    def note(self, detail: str) -> None:
        """Say what the step does now."""
        self._detail = f": {detail}"
        logger.info("start, step %d of %d: %s%s", self._number, len(Step), self._step, self._detail)

    @property
    def _number(self) -> int:
        return list(Step).index(self._step) + 1

    def __str__(self) -> str:
        elapsed_s = time.monotonic() - self._started_s
        where = f"step {self._number} of {len(Step)}, {elapsed_s:.0f} s since the start"
        return f"{self._step}{self._detail} ({where})"
